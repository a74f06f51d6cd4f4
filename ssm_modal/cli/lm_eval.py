"""`ssm-modal lm-eval`: lm-evaluation-harness on a language model."""

from __future__ import annotations

import argparse
import json

from ssm_modal.cli.language_model import add_model_arguments, open_text_model
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.text import expand_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="tasks of the harness, with commas: lambada_openai,piqa",
    )
    add("--include-path", metavar="FOLDER", help="a folder with task files (YAML) of your own")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question; default: the task's")
    add("--limit", type=float, metavar="N", help="questions of each task at most; below 1, a share of them")
    add("--batch-size", type=int, default=16, metavar="N", help="rows at once (%(default)s)")
    add(
        "--segment",
        type=int,
        default=8192,
        metavar="N",
        help="tokens at once; longer ones stream (%(default)s)",
    )
    add("--bootstrap-iters", type=int, default=100000, metavar="N", help="for standard errors (%(default)s)")
    add("--output", metavar="FILE", help="write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    # First the library, so that its absence is said before a model is loaded.
    from ssm_modal.evaluation.harness import HarnessModel  # isort: skip
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    include = None if args.include_path is None else str(expand_path(args.include_path, "--include-path"))
    # The harness has thousands of task files: they are read only where a task is not the caller's own.
    manager = TaskManager(include_path=include, include_defaults=False) if include is not None else None
    if manager is None or not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise ValueError(
            f"--tasks is {args.tasks!r}: {', '.join(unknown) or 'nothing'} is no task of the harness "
            "(lm_eval ls tasks lists them; --include-path adds your own)"
        )
    model, tokenizer, place = open_text_model(args)
    results = simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size=args.batch_size, segment=args.segment),
        tasks=tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=manager,
        bootstrap_iters=args.bootstrap_iters,
        log_samples=False,
    )
    if results is None:
        raise RuntimeError("the harness gave no results")
    print(make_table(results))
    if args.output is not None:
        kept = {"model": place, **{k: results[k] for k in ("results", "versions", "n-shot") if k in results}}
        atomic_write(expand_path(args.output, "--output"), json.dumps(kept, indent=2, default=str) + "\n")
    return 0

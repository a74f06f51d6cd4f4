"""How tokens are chosen, as options of the commands that generate text."""

from __future__ import annotations

import argparse

from ssm_modal.generation import GenerationConfig


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `sampling_config` reads."""
    defaults = GenerationConfig()
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="tokens to add to a text at most (256)")
    add(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 is greedy (%(default)s)",
    )
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="among the likeliest that reach P together",
    )
    add(
        "--min-p",
        type=float,
        default=defaults.min_p,
        metavar="P",
        help="among those P times as likely as the first",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=defaults.repetition_penalty,
        metavar="X",
        help="above 1 discourages tokens that were there already (%(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end where this text would come; again for more",
    )
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed gives the same again; default: a new one each time",
    )


def sampling_config(args: argparse.Namespace, *, eos_id: int | None = None) -> GenerationConfig:
    """The settings that the options say; raises the error that names a wrong one."""
    return GenerationConfig(
        max_new_tokens=256 if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        stop_at_eos=not args.ignore_eos,
        seed=args.seed,
        eos_id=eos_id,
    )

"""`ssm-modal evaluate`: perplexity of text files of any length."""

from __future__ import annotations

import argparse
import json

from ssm_modal.cli.language_model import add_model_arguments, open_text_model
from ssm_modal.evaluation import TextScore, score_text
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.text import expand_path, read_text, text_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("texts", nargs="+", metavar="PATH", help="text files, or folders whose .txt files are read")
    add(
        "--segment",
        type=int,
        default=8192,
        metavar="N",
        help="tokens at once; memory follows it (%(default)s)",
    )
    add("--output", metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    files = [file for path in args.texts for file in text_files(path, name="PATH")]
    model, tokenizer, place = open_text_model(args)
    rows = []
    total = TextScore(0.0, 0, 0)
    for file in files:
        ids = tokenizer.encode_ids(read_text(file))
        if ids.shape[0] < 2:
            raise ValueError(f"{file} holds {ids.shape[0]} tokens, expected at least 2")
        score = score_text(model, ids, n_bytes=tokenizer.count_bytes(ids[1:]), segment=args.segment)
        total = TextScore(total.nats + score.nats, total.targets + score.targets, total.bytes + score.bytes)
        rows.append((str(file), score))
    if len(rows) > 1:
        rows.append(("all", total))
    for name, score in rows:
        print(
            f"{name}: perplexity {score.perplexity:.4f}, {score.nats / score.targets:.4f} nats a token, "
            f"{score.bits_per_byte:.4f} bits a byte, {score.targets:,} tokens"
        )
    if args.output is not None:
        content = {
            "model": place,
            "texts": {
                name: {
                    "perplexity": score.perplexity,
                    "nats": score.nats,
                    "targets": score.targets,
                    "bits_per_byte": score.bits_per_byte,
                }
                for name, score in rows
            },
        }
        atomic_write(expand_path(args.output, "--output"), json.dumps(content, indent=2) + "\n")
    return 0

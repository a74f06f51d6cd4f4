"""`ssm-modal memory`: what registered models take, as a table."""

from __future__ import annotations

import argparse

import torch

from ssm_modal.models import memory_table

PUBLISHED = (
    "mamba_130m",
    "mamba_370m",
    "mamba_790m",
    "mamba_1_4b",
    "mamba_2_8b",
    "falcon_mamba_7b",
    "jamba_v0_1",
    "jamba_1_5_mini",
)
LENGTHS = (4_096, 65_536, 262_144, 1_048_576)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "models",
        nargs="*",
        default=list(PUBLISHED),
        metavar="NAME",
        help="registered models (ssm_modal.list_models()); default: the published ones",
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="N", help="tokens read (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (%(default)s)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 0, or raises the error that says what is wrong with the options."""
    print(memory_table(args.models, args.lengths, batch=args.batch, dtype=_DTYPES[args.dtype]), end="")
    return 0

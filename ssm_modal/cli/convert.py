"""`ssm-modal convert`: a model from one format into another."""

from __future__ import annotations

import argparse

import torch

from ssm_modal.checkpoints import load_pretrained, save_pretrained
from ssm_modal.checkpoints.saving import FORMATS, SHARD_BYTES
from ssm_modal.io.text import expand_path

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of this package, of transformers (mamba, falcon_mamba, jamba) or of state-spaces, a "
        "run's folder, a .ckpt file or a Hugging Face repository (owner/name)",
    )
    parser.add_argument("target", metavar="TARGET", help="the folder to write, new or empty")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="for this package, for transformers' AutoModelForCausalLM, or for mamba_ssm",
    )
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), help="dtype of the weights; default: as in SOURCE"
    )
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_BYTES / 1e9,
        metavar="GB",
        help="largest file that --to transformers writes, in 10^9 bytes (%(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    if not args.shard_gb > 0:
        raise ValueError(f"--shard-gb is {args.shard_gb}, expected more than 0")
    source = str(expand_path(args.source, "SOURCE"))
    target = expand_path(args.target, "TARGET")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"TARGET is {target}, which is there already, expected a new or an empty folder"
        )
    model = load_pretrained(source, dtype=None if args.dtype is None else _DTYPES[args.dtype])
    save_pretrained(
        model, target, format=args.to, source=source, shard_bytes=max(1, int(args.shard_gb * 1e9))
    )
    count = sum(p.numel() for p in model.parameters())
    files = ", ".join(sorted(p.name for p in target.iterdir()))
    print(f"{target}: {count:,} parameters in the format {args.to}: {files}")
    return 0

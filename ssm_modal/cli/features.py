"""`ssm-modal features`: a vector an image from a trained classifier, what its head sees, as safetensors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_modal.checkpoints import load_pretrained
from ssm_modal.cli.image_inputs import ImageInput, image_input
from ssm_modal.cli.language_model import find_device
from ssm_modal.io.atomic import put_in_place, write_aside
from ssm_modal.io.images import ImageError, find_images
from ssm_modal.io.left_out import write_left_out
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path
from ssm_modal.models import SequenceClassifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="a run's folder, a .ckpt file, a saved model's folder or a Hugging Face repository (owner/name)",
    )
    add("--images", required=True, metavar="PATH", help="an image, or a folder with images at any depth")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="the file to write: features (images, d_model) float32, and the files' names, a JSON list, as "
        '"files" of its metadata',
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    add("--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; "auto" takes the GPU if there is one')
    add(
        "--skip-bad",
        action="store_true",
        help="leave unreadable images out and list them in FILE.left_out.csv",
    )
    for name in ("mean", "std"):
        add(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{name} of each channel, for a model that was not saved by a run, which knows its own",
        )


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected 1 or more")
    target = expand_path(args.out, "--out")
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"--out is {str(target)!r}, expected a file that ends in .safetensors")
    place = expand_path(args.model, "--model")
    model: Any = load_pretrained(place, device=find_device(args.device))
    about = image_input(model, place, args.mean, args.std)
    files = find_images(args.images, "none").files
    done, vectors, left_out = _features(model, [one.path for one in files], about, args)
    if not done:
        raise ValueError(f"--images is {args.images!r}: no image of {len(files)} can be read")
    metadata = {"format": "pt", "files": json.dumps([os.fspath(file) for file in done])}
    tensors = {"features": torch.cat(vectors)}
    put_in_place(write_aside(target, lambda aside: save_file(tensors, aside, metadata)), target)
    if left_out:
        write_left_out(target.with_name(target.name + ".left_out.csv"), left_out)
    tail = f", {len(left_out)} left out" if left_out else ""
    print(f"{len(done)} images in {target}{tail}", file=sys.stderr)
    return 0


@torch.no_grad()
def _features(
    model: Any, files: list[Path], about: ImageInput, args: argparse.Namespace
) -> tuple[list[Path], list[Tensor], list[LeftOut]]:
    """The files that could be read, their vectors a batch, and what was left out."""
    device = next(model.parameters()).device
    done: list[Path] = []
    vectors: list[Tensor] = []
    left_out: list[LeftOut] = []
    for first in range(0, len(files), args.batch_size):
        images = []
        for file in files[first : first + args.batch_size]:
            try:
                images.append(about.read(file))
            except ImageError as error:
                if not args.skip_bad:
                    raise
                left_out.append(LeftOut(error.path, error.problem))
            else:
                done.append(file)
        if images:
            x = about.batch(images).to(device)
            if isinstance(model, SequenceClassifier):
                found = model.features(x)
            else:
                found = model.forward_head(model.forward_features(x), pre_logits=True)
            vectors.append(found.float().cpu())
    return done, vectors, left_out

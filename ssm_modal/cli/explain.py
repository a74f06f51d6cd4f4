"""`ssm-modal explain`: which input positions drove a decision, as arrays, a table and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ssm_modal.attribution import Attribution, attribute
from ssm_modal.attribution.hidden_attention import CHANNELS
from ssm_modal.attribution.result import METHODS
from ssm_modal.checkpoints import load_pretrained
from ssm_modal.checkpoints.locate import stored_data
from ssm_modal.cli.explain_inputs import Explained, read_input
from ssm_modal.cli.language_model import find_device
from ssm_modal.errors import nearest
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.text import expand_path, output_folder
from ssm_modal.plots import new_figure, png

_STRONGEST = 5  # positions that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="a run's folder, a .ckpt file, a saved model's folder or a Hugging Face repository; only the "
        "first two know the classes' names and how their data was prepared",
    )
    add("--input", metavar="FILE", help="what is explained: an audio, image, text, FASTA or GenBank file")
    add("--text", metavar="TEXT", help="text or bases instead of a file")
    add(
        "--region", metavar="REGION", help="part of a genome, 1-based with the end included: chr1:1,000-2,000"
    )
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="gets attribution.safetensors, attribution.csv, attribution.png",
    )
    add("--method", choices=METHODS, default=METHODS[0], help="%(default)s unless given")
    add("--target", metavar="CLASS", help="the class explained, name or number; default: the predicted one")
    add("--layer", metavar="N", help='of hidden_attention: a layer\'s number or "mean"; default: the last')
    add(
        "--position",
        type=int,
        metavar="N",
        help="of hidden_attention: the output step whose row it is, default: the one that weighed most; of a "
        "language model: the step whose prediction is explained, default: the last",
    )
    add(
        "--channels",
        choices=CHANNELS[:2],
        help="of hidden_attention: the mean over channels of absolute values (default) or of values",
    )
    add("--tokenizer", metavar="NAME|PATH", help="default: the one kept with the model")
    add("--sample-rate", type=int, metavar="HZ", help="of audio; default: the one kept with the run")
    for name in ("mean", "std"):
        add(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{name} of an image's channels, for a model not saved by a run, which knows its own",
        )
    add("--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; "auto" takes the GPU if there is one')


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    if (args.input is None) == (args.text is None):
        raise ValueError("give what is to be explained: either --input FILE or --text TEXT")
    device = find_device(args.device)
    out = output_folder(args.out)
    place = str(expand_path(args.model, "--model"))
    model = load_pretrained(place, device=device)
    data = stored_data(place)
    explained = read_input(
        model,
        data,
        place,
        file=None if args.input is None else expand_path(args.input, "--input"),
        text=args.text,
        region=args.region,
        tokenizer=args.tokenizer,
        sample_rate=args.sample_rate,
        mean=args.mean,
        std=args.std,
    )
    names = explained.classes
    found = attribute(
        model,
        explained.inputs.to(device),
        _target(args.target, names),
        method=args.method,
        layer=_layer(args.layer),
        position=args.position,
        channels=args.channels,
    )
    found = explained.arrange(found)
    # All three are made before any is written.
    table, picture = found.table(0, explained.labels), _picture(explained, found, names)
    found.save(out / "attribution.safetensors")
    atomic_write(out / "attribution.csv", table)
    atomic_write(out / "attribution.png", picture)
    print(_title(found, names))
    print(_strongest(found, explained.labels))
    print(f"written: {out}/attribution.safetensors, attribution.csv, attribution.png")
    return 0


def _target(given: str | None, names: Sequence[str]) -> int | None:
    if given is None:
        return None
    if given in names:
        return list(names).index(given)
    if given.lstrip("-").isdigit():
        return int(given)
    raise ValueError(f"--target is {given!r}, expected a class or its number: {nearest(given, names)}")


def _layer(given: str | None) -> int | Literal["mean"] | None:
    if given is None or given == "mean":
        return given  # type: ignore[return-value]  # narrowed by the comparison
    try:
        return int(given)
    except ValueError:
        raise ValueError(f'--layer is {given!r}, expected a number or "mean"') from None


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def _title(found: Attribution, names: Sequence[str]) -> str:
    probabilities = found.logits[0].double().softmax(-1)
    best, target = int(probabilities.argmax()), int(found.target[0])
    text = f"{_name(best, names)} ({100 * float(probabilities[best]):.1f} %)"
    if target != best:
        text += f", explained: {_name(target, names)} ({100 * float(probabilities[target]):.1f} %)"
    if found.positions is None:
        return f"{text}: gradient x input"
    where = "mean over layers" if found.layer == "mean" else f"layer {found.layer}"
    return f"{text}: hidden attention of step {int(found.positions[0])}, {where}"


def _strongest(found: Attribution, labels: Sequence[str] | None) -> str:
    values = found.relevance[0]
    flat = values.flatten()
    lines = []
    for i in flat.abs().topk(min(_STRONGEST, flat.shape[0])).indices.tolist():
        if values.ndim == 2:
            place = f"row {i // values.shape[1]}, column {i % values.shape[1]}"
        else:
            place = f"position {i * found.stride}" + ("" if labels is None else f" {labels[i]!r}")
        lines.append(f"  {place}: {float(flat[i]):.4g}")
    return "\n".join(["strongest:", *lines])


def _picture(explained: Explained, found: Attribution, names: Sequence[str]) -> bytes:
    figure = new_figure(*explained.size)
    figure.suptitle(_title(found, names), fontsize=9, parse_math=False)
    explained.draw(figure, _first(found.relevance))
    return png(figure)


def _first(relevance: Tensor) -> Tensor:
    return relevance[0].to(torch.float32)

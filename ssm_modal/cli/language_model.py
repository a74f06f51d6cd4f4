"""What the commands that run a language model share: its options, the model, its tokenizer, the device."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ssm_modal.checkpoints import load_pretrained
from ssm_modal.checkpoints.adapters import load_adapter
from ssm_modal.checkpoints.locate import locate, stored_data
from ssm_modal.errors import CheckpointError
from ssm_modal.io.text import expand_path
from ssm_modal.layers.quantized import QUANTISATIONS
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import (
    MuLawTokenizer,
    TextTokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_from_config,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs where."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a saved model's folder, a run's folder, a .ckpt file or a Hugging Face repository (owner/name)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help='"byte", "byte+eos" or a tokenizer.json; default: the one kept with the model',
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of the model, as peft writes it")
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; "auto" takes the GPU if there is one'
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: as they were saved"
    )
    parser.add_argument(
        "--quantize", choices=QUANTISATIONS, help="pack the weights in 8 or 4 bits in loading"
    )


def open_model(args: argparse.Namespace) -> tuple[CausalLM, TextTokenizer | MuLawTokenizer, str]:
    """The model and tokenizer that the options say, and the place they came from."""
    device = find_device(args.device)
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    place = str(expand_path(args.model, "--model"))
    model = load_pretrained(place, device=device, dtype=dtype, quantize=args.quantize)
    if not isinstance(model, CausalLM):
        raise ValueError(f"--model is a {type(model).__name__}, expected a causal language model (CausalLM)")
    if args.adapter is not None:
        load_adapter(model, expand_path(args.adapter, "--adapter"))
    return model, find_tokenizer(place, args.tokenizer), place


def check_vocabulary(model: CausalLM, tokenizer: TextTokenizer | MuLawTokenizer) -> None:
    """Raise ValueError for a tokenizer with ids that the model does not know."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model knows {model.config.vocab_size}; "
            "give the tokenizer that it was trained with by --tokenizer"
        )


def open_text_model(args: argparse.Namespace) -> tuple[CausalLM, TextTokenizer, str]:
    """As `open_model`, for commands on texts alone."""
    model, tokenizer, place = open_model(args)
    check_vocabulary(model, tokenizer)
    if isinstance(tokenizer, MuLawTokenizer):
        raise ValueError(f"--model is {place}, a model of waveforms, expected one of texts")
    return model, tokenizer, place


def find_tokenizer(model: str, spec: str | None = None) -> TextTokenizer | MuLawTokenizer:
    """The tokenizer that `spec` means, or with None the one kept with the model at `model`.

    That is the `tokenizer.json` in the model's folder or repository, beside a .ckpt file or in its run's
    folder, else the one a checkpoint of the text data module holds. Raises ValueError when there is none.
    """
    if spec is not None:
        if spec == "char":
            raise ValueError(
                '--tokenizer is "char", which is made from a text; give the tokenizer.json of the run'
            )
        named = expand_path(spec, "--tokenizer")
        return load_tokenizer(named) if named.exists() else build_tokenizer(spec)
    place = Path(model)
    if not place.exists():
        place = locate(model)  # a repository's files, which are in the local cache by now
    folders = [place] if place.is_dir() else [place.parent, place.parent.parent]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
    stored = _stored_tokenizer(place)
    if stored is not None:
        return stored
    looked = " or ".join(str(folder) for folder in folders)
    raise ValueError(
        f"no tokenizer is kept with the model: there is no tokenizer.json in {looked}; "
        'give one with --tokenizer ("byte" for a model over bytes, or the path of a tokenizer.json)'
    )


def _stored_tokenizer(place: Path) -> TextTokenizer | MuLawTokenizer | None:
    """The tokenizer in the checkpoint at `place`, a .ckpt file or a run's folder; None without one."""
    try:
        kept = stored_data(place).get("tokenizer")
    except CheckpointError:
        return None
    return None if kept is None else tokenizer_from_config(json.loads(kept))


def find_device(name: str) -> torch.device:
    """The device that --device means; ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f'--device is {name!r}, expected "auto", "cpu", "cuda" or "cuda:0", "cuda:1", ...'
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device is {name!r}, but torch finds no NVIDIA GPU here; ssm-modal doctor says more"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"--device is {name!r}, but there are only {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return device

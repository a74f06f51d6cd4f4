"""`ssm-modal generate`: continue texts with a trained model, printed as they come, or write WAV files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

import torch

from ssm_modal.checkpoints import load_pretrained
from ssm_modal.checkpoints.locate import locate, stored_data
from ssm_modal.cli import generate_audio
from ssm_modal.errors import CheckpointError
from ssm_modal.generation import GenerationConfig, generate
from ssm_modal.io.text import expand_path, read_text
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import (
    MuLawTokenizer,
    TextTokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_from_config,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Options that one kind of model takes alone.
_OF_TEXT = ("prompt", "prompt_file", "max_new_tokens", "stop", "ignore_eos", "no_stream")
_OF_WAVEFORMS = ("out", "label", "number", "max_seconds", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    defaults = GenerationConfig()
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a saved model's folder, a run's folder, a .ckpt file or a Hugging Face repository (owner/name)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the text to continue; again for more texts",
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file whose whole text is a prompt",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help='"byte", "byte+eos" or a tokenizer.json; default: the one kept with the model',
    )
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
    add("--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; "auto" takes the GPU if there is one')
    add("--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: as they were saved")
    add("--no-stream", action="store_true", help="print each text when it is complete, not as it comes")
    generate_audio.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    config = GenerationConfig(
        max_new_tokens=256 if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        stop_at_eos=not args.ignore_eos,
        seed=args.seed,
    )
    texts = [*args.prompt, *(read_text(expand_path(file, "--prompt-file")) for file in args.prompt_file)]
    for text in texts:
        if not text:
            raise ValueError("--prompt is empty, expected a text of at least one character to continue")
    device = find_device(args.device)
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    place = str(expand_path(args.model, "--model"))
    model = load_pretrained(place, device=device, dtype=dtype)
    if not isinstance(model, CausalLM):
        raise ValueError(f"--model is a {type(model).__name__}, expected a causal language model (CausalLM)")
    tokenizer = find_tokenizer(place, args.tokenizer)
    waveforms = isinstance(tokenizer, MuLawTokenizer)
    given = [
        f"--{n.replace('_', '-')}" for n in (_OF_TEXT if waveforms else _OF_WAVEFORMS) if _given(args, n)
    ]
    if given:
        kinds = ("texts", "waveforms") if waveforms else ("waveforms", "texts")
        raise ValueError(f"{', '.join(given)}: for models of {kinds[0]}, but --model is one of {kinds[1]}")
    if not waveforms and not texts:
        raise ValueError("no prompt is given; give one or more with --prompt TEXT or --prompt-file FILE")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model knows {model.config.vocab_size}; "
            "give the tokenizer that it was trained with by --tokenizer"
        )
    if isinstance(tokenizer, MuLawTokenizer):
        return generate_audio.run(args, model, tokenizer, config)
    printer = _Printer(texts, sys.stdout, stream=not args.no_stream)
    prompts = [tokenizer.encode(text) for text in texts]
    printer.start()
    generate(model, prompts, config, tokenizer=tokenizer, on_text=printer.add)
    printer.finish()
    return 0


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) not in (None, False, [])


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


class _Printer:
    """Prints the texts: a single one piece by piece, several in lines numbered by prompt."""

    def __init__(self, prompts: list[str], out: TextIO, stream: bool) -> None:
        self._out, self._stream = out, stream
        self._single = len(prompts) == 1
        # What is known of each text and not yet printed.
        self._held = list(prompts)
        self._last = "\n"

    def start(self) -> None:
        """Print the prompts, as far as they are to stand there before the first token."""
        if self._stream:
            for row in range(len(self._held)):
                self._flush(row, whole=False)

    def add(self, row: int, text: str) -> None:
        """The next piece of the text of `row`."""
        self._held[row] += text
        if self._stream:
            self._flush(row, whole=False)

    def finish(self) -> None:
        """Print what is left, and end the last line."""
        for row in range(len(self._held)):
            self._flush(row, whole=True)
        if self._last != "\n":
            self._write("\n")

    def _flush(self, row: int, whole: bool) -> None:
        held = self._held[row]
        if self._single:
            self._held[row] = ""
            self._write(held)
            return
        *lines, rest = held.split("\n")
        if whole and rest:
            lines, rest = [*lines, rest], ""
        self._held[row] = rest
        for line in lines:
            self._write(f"[{row + 1}] {line}\n")

    def _write(self, text: str) -> None:
        if not text:
            return
        self._last = text[-1]
        try:
            self._out.write(text)
        except UnicodeEncodeError:
            # A terminal that cannot show a character shows a question mark instead of ending the run.
            encoding = self._out.encoding or "ascii"
            self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()

"""`ssm-modal generate`: continue texts with a trained model, printed as they come, or write WAV files."""

from __future__ import annotations

import argparse
import sys
from typing import TextIO

from ssm_modal.cli import generate_audio
from ssm_modal.cli.language_model import add_model_arguments, check_vocabulary, open_model
from ssm_modal.cli.sampling_options import add_sampling_arguments, sampling_config
from ssm_modal.generation import generate, load_state, save_state
from ssm_modal.io.text import expand_path, read_text
from ssm_modal.tokenizers import MuLawTokenizer

# Options that one kind of model takes alone.
_OF_TEXT = (
    "prompt",
    "prompt_file",
    "max_new_tokens",
    "stop",
    "ignore_eos",
    "no_stream",
    "state",
    "save_state",
)
_OF_WAVEFORMS = ("out", "label", "number", "max_seconds", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
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
    add_sampling_arguments(parser)
    add = parser.add_argument
    add("--state", metavar="FILE", help="go on from the state of a text read before (--save-state)")
    add("--save-state", metavar="FILE", help="keep the state after prompt and text, to go on from by --state")
    add("--no-stream", action="store_true", help="print each text when it is complete, not as it comes")
    generate_audio.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    config = sampling_config(args)
    texts = [*args.prompt, *(read_text(expand_path(file, "--prompt-file")) for file in args.prompt_file)]
    for text in texts:
        if not text:
            raise ValueError("--prompt is empty, expected a text of at least one character to continue")
    if args.save_state is not None and len(texts) > 1:
        raise ValueError(f"--save-state is given with {len(texts)} prompts, expected one")
    model, tokenizer, _ = open_model(args)
    waveforms = isinstance(tokenizer, MuLawTokenizer)
    given = [
        f"--{n.replace('_', '-')}" for n in (_OF_TEXT if waveforms else _OF_WAVEFORMS) if _given(args, n)
    ]
    if given:
        kinds = ("texts", "waveforms") if waveforms else ("waveforms", "texts")
        raise ValueError(f"{', '.join(given)}: for models of {kinds[0]}, but --model is one of {kinds[1]}")
    if not waveforms and not texts:
        raise ValueError("no prompt is given; give one or more with --prompt TEXT or --prompt-file FILE")
    check_vocabulary(model, tokenizer)
    if isinstance(tokenizer, MuLawTokenizer):
        return generate_audio.run(args, model, tokenizer, config)
    state = None
    if args.state is not None:
        state = load_state(model, expand_path(args.state, "--state"))
        if state.batch_size == 1:
            state = state.select([0] * len(texts))  # one prefix, forked for each prompt
    printer = _Printer(texts, sys.stdout, stream=not args.no_stream)
    prompts = [tokenizer.encode(text) for text in texts]
    printer.start()
    result = generate(
        model,
        prompts,
        config,
        state=state,
        tokenizer=tokenizer,
        on_text=printer.add if not args.no_stream else None,
        return_states=args.save_state is not None,
    )
    if args.no_stream:
        for row, text in enumerate(result.texts or []):
            printer.add(row, text)
    printer.finish()
    if result.states is not None:
        save_state(model, result.states[0], expand_path(args.save_state, "--save-state"))
    return 0


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) not in (None, False, [])


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

"""`ssm-modal chat`: a conversation with a model tuned to chat, through its tokenizer's chat template."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssm_modal.checkpoints.locate import locate
from ssm_modal.cli.language_model import add_model_arguments, open_text_model
from ssm_modal.cli.sampling_options import add_sampling_arguments, sampling_config
from ssm_modal.generation import CausalModel, GenerationConfig, generate
from ssm_modal.state import State
from ssm_modal.tokenizers import ChatTemplate, TextTokenizer

_HELP = "An empty line or Ctrl-D ends the conversation; /new begins another."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first question")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the lines of standard input until an empty one; returns 0, or raises what is wrong."""
    config = sampling_config(args)
    model, tokenizer, place = open_text_model(args)
    template = ChatTemplate.from_folder(Path(place) if Path(place).is_dir() else locate(place))
    talk = Conversation(model, tokenizer, template, config, system=args.system)
    terminal = sys.stdin.isatty()
    if terminal:
        print(_HELP)
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return 0
        if line == "/new":
            talk.restart()
            continue
        talk.answer(line, lambda row, text: print(text, end="", flush=True))
        print()


class Conversation:
    """Messages and the state of the model that has read them: each turn reads only what is new."""

    def __init__(
        self,
        model: CausalModel,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        config: GenerationConfig,
        *,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        ends = tokenizer.encode(template.tokens.get("eos_token", ""))
        self.config = replace(config, eos_id=ends[0]) if len(ends) == 1 else config
        self.system = system
        self.restart()

    def restart(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.read: list[int] = []  # what `state` has read
        self.state: State | None = None

    def answer(self, question: str, on_text: Any = None) -> str:
        """The answer to `question`; `on_text(row, text)` is given each piece of it as it comes."""
        self.messages.append({"role": "user", "content": question})
        ids = self.tokenizer.encode(self.template.render(self.messages))
        known = len(self.read)
        # A template may render what was said in another way than it came: then all is read again.
        if known >= len(ids) or ids[:known] != self.read:
            known, self.state = 0, None
        result = generate(
            self.model,
            [ids[known:]],
            self.config,
            state=self.state,
            tokenizer=self.tokenizer,
            on_text=on_text,
            return_states=True,
        )
        assert result.texts is not None
        assert result.states is not None
        self.read, self.state = ids + result.tokens[0], result.states[0]
        self.messages.append({"role": "assistant", "content": result.texts[0]})
        return result.texts[0]

"""Chat templates as Hugging Face tokenizers carry them: messages to the text a model was tuned on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

_CONFIG = "tokenizer_config.json"


class ChatTemplate:
    """Renders messages, [{"role": "user", "content": ...}, ...].

    source: the Jinja template. tokens: the special tokens it may name, such as bos_token and eos_token.
    Templates come with models, so they run in Jinja's sandbox, as in transformers.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ChatTemplate:
        """The template in a model's folder: chat_template.jinja, else in tokenizer_config.json.

        Raises ValueError where there is none.
        """
        place = Path(folder)
        config: dict[str, Any] = {}
        if (place / _CONFIG).is_file():
            config = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {one["name"]: one["template"] for one in source}.get("default")
        if (place / "chat_template.jinja").is_file():
            source = (place / "chat_template.jinja").read_text(encoding="utf-8")
        if not isinstance(source, str):
            raise ValueError(
                f"{place} has no chat template (chat_template.jinja, or chat_template in {_CONFIG}); "
                "a model that was not tuned to chat continues texts: ssm-modal generate"
            )
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
        return cls(source, tokens)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of `messages`, with the opening of an answer behind it unless told otherwise.

        Raises ValueError where the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)

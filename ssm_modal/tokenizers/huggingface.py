"""Any Hugging Face `tokenizer.json`; the `tokenizers` package, an extra, is imported when one is opened."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ssm_modal.tokenizers.base import KIND, StreamDecoder, TextTokenizer

# A tokenizer.json does not say which of its special tokens ends a document; these are the names in use.
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
_REPLACEMENT = "\ufffd"
# Ids before a stream that its decoder sees, so that a first word keeps its leading space.
_CONTEXT = 8


class HuggingFaceTokenizer(TextTokenizer):
    """The tokenizer in a `tokenizer.json`.

    content: the file's content. eos_token: the special token that ends a document; with `guess_eos` and no
    `eos_token`, the first of the usual names (`<|endoftext|>`, `</s>`, ...) among the special tokens, if any.
    Encoding adds no special tokens of its own; special tokens written out in the text are recognised.
    Raises ImportError, naming the command that mends it, when the `tokenizers` package is missing.
    """

    def __init__(self, content: str, *, eos_token: str | None = None, guess_eos: bool = True) -> None:
        package = _tokenizers()
        try:
            self._tokenizer = package.Tokenizer.from_str(content)
        except Exception as error:  # the package raises a bare Exception
            raise ValueError(f"the content is no Hugging Face tokenizer.json: {error}") from error
        # Some files carry truncation or padding settings of a past use, which would silently change the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("the tokenizer's vocabulary is empty")
        # The largest id, not the count: some vocabularies have holes.
        self.vocab_size = max(vocabulary.values()) + 1
        if eos_token is None and guess_eos:
            special = {t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special}
            eos_token = next((name for name in _EOS_NAMES if name in special), None)
        if eos_token is not None and eos_token not in vocabulary:
            raise ValueError(f"eos_token is {eos_token!r}, which is not in the tokenizer's vocabulary")
        self.eos_token = eos_token
        self.eos_id = None if eos_token is None else vocabulary[eos_token]

    @classmethod
    def from_json(
        cls, content: str, *, eos_token: str | None = None, guess_eos: bool = True
    ) -> HuggingFaceTokenizer:
        """The tokenizer in the text `content` of a `tokenizer.json`."""
        return cls(content, eos_token=eos_token, guess_eos=guess_eos)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, eos_token: str | None = None) -> HuggingFaceTokenizer:
        """The tokenizer in the file `path`, a `tokenizer.json`."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer is {str(file)!r}: there is no such file")
        return cls(file.read_text(encoding="utf-8"), eos_token=eos_token)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return str(self._tokenizer.decode(self.check_ids(ids), skip_special_tokens=True))

    def stream(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _HuggingFaceStream(self, self.check_ids(before[-_CONTEXT:]))

    def to_config(self) -> dict[str, Any]:
        return {
            KIND: "huggingface",
            "eos_token": self.eos_token,
            "tokenizer": json.loads(self._tokenizer.to_str()),
        }


class _HuggingFaceStream(StreamDecoder):
    """Decodes the last few ids again and emits what became longer.

    A decoder may look at neighbours (leading spaces, bytes of one character in several tokens), so one id
    cannot be decoded alone; nor need all of them be: the ids since the last emitted text, after those of that
    text, suffice.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = before
        self._read = len(before)

    def push(self, token: int) -> str:
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[: self._read])
        after = self._tokenizer.decode(self._ids)
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._read])
        after = self._tokenizer.decode(self._ids)
        self._ids, self._read = [], 0
        return after[len(before) :]


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(
            "a Hugging Face tokenizer needs the package tokenizers, which is not installed; "
            "install it with: pip install 'ssm-modal[text]'"
        ) from error

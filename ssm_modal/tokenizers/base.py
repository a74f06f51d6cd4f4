"""What every text tokenizer can do."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.atomic import atomic_write

# The key that marks a file as one of this package's tokenizers, its value the kind.
KIND = "ssm_modal_tokenizer"


class StreamDecoder(ABC):
    """Text from ids that come one by one: `push` gives the text an id completes, `finish` what was held back.

    All pieces joined equal `decode` of all ids.
    """

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that is certain once `token` has come, perhaps ""."""

    @abstractmethod
    def finish(self) -> str:
        """The text still held back, such as an unfinished character, as `decode` would end."""


class TextTokenizer(ABC):
    """Text to ids 0 ... vocab_size - 1 and back.

    vocab_size: number of ids. eos_id: the id that ends a document, None where there is none.
    """

    vocab_size: int
    eos_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, no special ids added. Raises ValueError for text it cannot express."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of `ids`, special ids left out. Raises ValueError for an id outside the vocabulary."""

    @abstractmethod
    def stream(self, before: Sequence[int] = ()) -> StreamDecoder:
        """A fresh decoder for ids that come one by one behind `before`, whose text it does not repeat."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain JSON-like data from which `tokenizer_from_config` makes the same tokenizer."""

    def encode_ids(self, text: str) -> Tensor:
        """As `encode`, as a tensor (n,) of an integer dtype; the quick way for much text."""
        return torch.tensor(self.encode(text), dtype=torch.int64)

    def count_bytes(self, ids: Tensor) -> int:
        """Bytes of UTF-8 text that ids (n,) of any integer dtype stand for, special ids for none."""
        return len(self.decode(ids).encode("utf-8"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tokenizer to the file `path`, whole or not at all; `load_tokenizer` reads it."""
        return atomic_write(path, json.dumps(self.to_config(), ensure_ascii=False, indent=1) + "\n")

    def fingerprint(self) -> str:
        """A hash that two tokenizers share only when they encode alike."""
        return hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode()).hexdigest()

    def check_ids(self, ids: Sequence[int] | Tensor) -> list[int]:
        """`ids` as a list; raises ValueError for one outside the vocabulary."""
        host = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        for at, token in enumerate(host):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids[{at}] is {token}, expected 0 to {self.vocab_size - 1}, the vocabulary")
        return host

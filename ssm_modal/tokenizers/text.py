"""Bytes or characters as tokens, and the functions that find the tokenizer a name or a file means."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.text import expand_path
from ssm_modal.tokenizers.base import KIND, StreamDecoder, TextTokenizer
from ssm_modal.tokenizers.dna import NucleotideTokenizer
from ssm_modal.tokenizers.huggingface import HuggingFaceTokenizer
from ssm_modal.tokenizers.kmers import KmerTokenizer
from ssm_modal.tokenizers.waveform import MuLawTokenizer

_SPECIALS = ("eos", "pad")
_CODE_POINTS = 0x110000


class ByteTokenizer(TextTokenizer):
    """The bytes of UTF-8 as ids 0 ... 255; `specials` ("eos", "pad"), in their order, follow from 256 on.

    Any text can be encoded. Bytes that are not valid UTF-8 decode to U+FFFD.
    """

    def __init__(self, specials: Sequence[str] = ()) -> None:
        if (
            isinstance(specials, str)
            or len(set(specials)) != len(specials)
            or not set(specials) <= set(_SPECIALS)
        ):
            raise ValueError(
                f"specials is {specials!r}, expected a list of some of {_SPECIALS}, each at most once"
            )
        self.specials = tuple(specials)
        self.vocab_size = 256 + len(self.specials)
        self.eos_id = 256 + self.specials.index("eos") if "eos" in self.specials else None
        self.pad_id = 256 + self.specials.index("pad") if "pad" in self.specials else None

    def encode(self, text: str) -> list[int]:
        return list(self._bytes(text))

    def encode_ids(self, text: str) -> Tensor:
        data = self._bytes(text)
        if not data:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return bytes(i for i in self.check_ids(ids) if i < 256).decode("utf-8", "replace")

    def count_bytes(self, ids: Tensor) -> int:
        return int((ids.to(torch.int64) < 256).sum())

    def stream(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _ByteStream(self)

    def to_config(self) -> dict[str, Any]:
        return {KIND: "byte", "specials": list(self.specials)}

    @staticmethod
    def _bytes(text: str) -> bytes:
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has the lone surrogate {text[error.start]!r} at character {error.start}, "
                "which UTF-8 cannot express"
            ) from None


class _ByteStream(StreamDecoder):
    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        (token,) = self._tokenizer.check_ids([token])
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class CharTokenizer(TextTokenizer):
    """Characters as ids, e.g. the distinct ones of a text; one outside the vocabulary raises ValueError."""

    def __init__(self, characters: Sequence[str]) -> None:
        chars = list(characters)
        if not chars:
            raise ValueError("characters is empty, expected at least one character")
        for char in chars:
            if not isinstance(char, str) or len(char) != 1:
                raise ValueError(f"characters holds {char!r}, expected single characters")
        if len(set(chars)) != len(chars):
            raise ValueError("characters holds a character twice, expected distinct characters")
        self.characters = tuple(chars)
        self.vocab_size = len(chars)
        self.eos_id = None
        self._table: Tensor | None = None
        self._id = {char: i for i, char in enumerate(chars)}

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> CharTokenizer:
        """The tokenizer of the characters in `text`, a string or pieces of one."""
        seen: set[str] = set()
        for piece in [text] if isinstance(text, str) else text:
            seen.update(piece)
        if not seen:
            raise ValueError("text is empty, expected at least one character")
        return cls(sorted(seen))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._id[char] for char in text]
        except KeyError as error:
            raise self._unknown(text, text.index(error.args[0])) from None

    def encode_ids(self, text: str) -> Tensor:
        if not text:
            return torch.empty(0, dtype=torch.int64)
        if self._table is None:
            self._table = torch.full((_CODE_POINTS,), -1, dtype=torch.int32)
            points = torch.tensor([ord(c) for c in self.characters])
            self._table[points] = torch.arange(self.vocab_size, dtype=torch.int32)
        points = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
        ids = self._table[points]
        if int(ids.min()) < 0:
            raise self._unknown(text, int((ids < 0).nonzero()[0]))
        return ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return "".join(self.characters[i] for i in self.check_ids(ids))

    def stream(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _CharStream(self)

    def to_config(self) -> dict[str, Any]:
        return {KIND: "char", "characters": "".join(self.characters)}

    def _unknown(self, text: str, at: int) -> ValueError:
        return ValueError(
            f"text has {text[at]!r} (U+{ord(text[at]):04X}) at character {at}, expected one of the "
            f"{self.vocab_size} characters of the vocabulary"
        )


class _CharStream(StreamDecoder):
    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


def tokenizer_from_config(config: dict[str, Any]) -> TextTokenizer | MuLawTokenizer:
    """The tokenizer, of text or of waveforms, whose `to_config` gave `config`, or that of a Hugging Face
    `tokenizer.json`'s content."""
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict, got {type(config).__name__}")
    if KIND not in config:
        if "model" in config:
            return HuggingFaceTokenizer.from_json(json.dumps(config, ensure_ascii=False))
        raise ValueError(
            f"config has the keys {sorted(config)}, expected {KIND!r} or those of a tokenizer.json"
        )
    kind = config[KIND]
    fields = {
        "byte": {"specials"},
        "char": {"characters"},
        "huggingface": {"tokenizer", "eos_token"},
        "nucleotide": set(),
        "kmer": {"k", "overlapping"},
        "mu_law": {"levels", "classes", "sample_rate"},
    }
    if kind not in fields:
        raise ValueError(f"{KIND} is {kind!r}, expected one of {sorted(fields)}")
    unknown = set(config) - fields[kind] - {KIND}
    if unknown:
        raise ValueError(f"config of a {kind!r} tokenizer has the unknown keys {sorted(unknown)}")
    if kind == "byte":
        return ByteTokenizer(config.get("specials", ()))
    if kind == "nucleotide":
        return NucleotideTokenizer()
    if kind == "mu_law":
        return MuLawTokenizer.from_config(config)
    if kind == "kmer":
        return KmerTokenizer(config.get("k", 6), config.get("overlapping", False))
    needed = "characters" if kind == "char" else "tokenizer"
    if needed not in config:
        raise ValueError(f"config of a {kind!r} tokenizer lacks the key {needed!r}")
    if kind == "char":
        return CharTokenizer(config["characters"])
    content = json.dumps(config["tokenizer"], ensure_ascii=False)
    return HuggingFaceTokenizer.from_json(content, eos_token=config.get("eos_token"), guess_eos=False)


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer | MuLawTokenizer:
    """The tokenizer in the file `path`, or in `tokenizer.json` of the folder `path`.

    Reads what `save` wrote and any Hugging Face `tokenizer.json`. Raises FileNotFoundError when there is
    none, ValueError for a file that is no tokenizer.
    """
    file = expand_path(path, "tokenizer")
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer is {str(file)!r}: there is no such file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return tokenizer_from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no tokenizer: {error}") from error


def build_tokenizer(
    spec: str | dict[str, Any] | TextTokenizer, text: Iterable[str] | None = None
) -> TextTokenizer:
    """The tokenizer `spec` means.

    spec: "byte"; "byte+eos" (id 256 ends each document); "char" (the characters of `text`, pieces of the text
    to be encoded, needed here alone); "nucleotide"; the path of a tokenizer file or of a folder holding
    `tokenizer.json`; a config as `to_config` gives; or a tokenizer, returned as it is. Raises ValueError for
    the tokenizer of waveforms.
    """
    if isinstance(spec, TextTokenizer):
        return spec
    if isinstance(spec, dict):
        return _text(tokenizer_from_config(spec), "the config given")
    if not isinstance(spec, (str, Path)):
        raise TypeError(f"tokenizer must be a name, a path or a config, got {type(spec).__name__}")
    if spec == "byte":
        return ByteTokenizer()
    if spec == "byte+eos":
        return ByteTokenizer(("eos",))
    if spec == "nucleotide":
        return NucleotideTokenizer()
    if spec == "char":
        if text is None:
            raise ValueError('tokenizer is "char", which is made from a text, but no text was given')
        return CharTokenizer.from_text(text)
    if not expand_path(spec, "tokenizer").exists():
        raise FileNotFoundError(
            f'tokenizer is {str(spec)!r}, expected "byte", "byte+eos", "char", "nucleotide" or the path of '
            "a tokenizer.json"
        )
    return _text(load_tokenizer(spec), str(spec))


def _text(tokenizer: TextTokenizer | MuLawTokenizer, what: str) -> TextTokenizer:
    if isinstance(tokenizer, MuLawTokenizer):
        raise ValueError(f"tokenizer is that of waveforms ({what}), expected one of text")
    return tokenizer

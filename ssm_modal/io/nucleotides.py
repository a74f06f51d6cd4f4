"""Nucleotides as bytes: the letters that are allowed, their complement, and the error of a genome's file.

Letters are upper-case ASCII in uint8 tensors: A, C, G, T and the codes of IUPAC for several bases (NC-IUB
1984, https://doi.org/10.1093/nar/13.9.3021). Lower case is folded, U (RNA) becomes T; gaps are no
nucleotides.
"""

from __future__ import annotations

import ctypes
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

IUPAC = "ACGTRYSWKMBDHVN"
_COMPLEMENTS = "TGCAYRSWMKVHDBN"
N = ord("N")
_ALLOWED = (IUPAC + "U" + IUPAC.lower() + "u").encode()
_FOLD = bytes.maketrans(_ALLOWED, (IUPAC + "T" + IUPAC + "T").encode())
_COMPLEMENT = bytes.maketrans(IUPAC.encode(), _COMPLEMENTS.encode())
_COMPLEMENT_TABLE = torch.frombuffer(bytearray(_COMPLEMENT), dtype=torch.uint8)


class GenomeError(ValueError):
    """A file of sequences, intervals or labels that cannot be used, or a place that it does not have.

    path: the file. problem: what is wrong, naming the line or the record.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        self.path = Path(path)
        self.problem = problem
        super().__init__(f"{self.path}: {problem}")

    def __reduce__(self) -> tuple[type[GenomeError], tuple[Path, str]]:
        return type(self), (self.path, self.problem)


class LetterError(ValueError):
    """A letter that is no nucleotide. letter: which. position: its place, counted from 0."""

    def __init__(self, letter: str, position: int) -> None:
        self.letter, self.position = letter, position
        super().__init__(
            f"letter {letter!r} at base {position + 1} is no nucleotide, expected one of {IUPAC} or U"
        )


def fold_letters(text: str) -> bytes:
    """`text` as upper-case ASCII with T for U; raises LetterError for a letter that is no nucleotide."""
    raw = text.encode("ascii", "replace")
    if raw.translate(None, _ALLOWED):
        position = next(i for i, letter in enumerate(raw) if letter not in _ALLOWED)
        raise LetterError(text[position], position)
    return raw.translate(_FOLD)


def letters_of(text: str) -> Tensor:
    """The letters of `text`, folded, as uint8 (n,); raises LetterError for one that is no nucleotide."""
    folded = fold_letters(text)
    return (
        torch.frombuffer(bytearray(folded), dtype=torch.uint8)
        if folded
        else torch.empty(0, dtype=torch.uint8)
    )


def text_of(letters: Tensor) -> str:
    """The text of uint8 letters (n,); the inverse of `letters_of` on folded text."""
    whole = letters.contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.numel()).decode("ascii") if whole.numel() else ""


def reverse_complement(letters: Tensor) -> Tensor:
    """The other strand of uint8 letters (..., n), read in its own direction; codes of IUPAC included.

    Its own inverse: R (A or G) becomes Y (T or C), N stays N.
    """
    return _COMPLEMENT_TABLE[letters.flip(-1).to(torch.int64)]


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """`path` opened as UTF-8 text, decompressed where its first bytes are those of gzip (bgzip is gzip too).

    Raises FileNotFoundError, and GenomeError for an empty file, and, while it is read, for a compressed file
    that is cut short or corrupt and for bytes that are no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}: there is no such file")
    with open(path, "rb") as file:
        magic = file.read(2)
    if not magic:
        raise GenomeError(path, "the file is empty (0 bytes)")
    opener = gzip.open if magic == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8") as source:
        try:
            yield source  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise GenomeError(path, f"the compressed file is cut short or corrupt ({error})") from error
        except UnicodeDecodeError as error:
            raise GenomeError(path, f"is no text: {error}") from error

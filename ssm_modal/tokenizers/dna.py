"""Nucleotides as ids, and what every tokenizer of DNA can do, its reverse-complement map of ids included."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.nucleotides import IUPAC, letters_of, text_of
from ssm_modal.tokenizers.base import KIND, StreamDecoder, TextTokenizer

BASES = "ACGT"
_LETTERS = torch.frombuffer(bytearray(b"ACGTN"), dtype=torch.uint8)
SPECIALS = ("pad", "mask", "begin", "end")


def digits_of(letters: Tensor) -> Tensor:
    """Upper-case letters, uint8 (...), as int64 of the same shape: A C G T are 0 to 3, all others 4.

    Raises TypeError for another dtype, ValueError for a letter that is no upper-case code of IUPAC.
    """
    if letters.dtype != torch.uint8:
        raise TypeError(f"letters is {letters.dtype}, expected torch.uint8")
    digits = _DIGITS[letters.to(torch.int64)]
    if digits.numel() and int(digits.max()) > 4:
        at = int((digits.flatten() > 4).nonzero()[0])
        raise ValueError(
            f"letters holds {int(letters.flatten()[at])} at place {at}, expected ASCII codes of {IUPAC}"
        )
    return digits.to(torch.int64)


def letters_from(digits: Tensor) -> Tensor:
    """The letters of digits 0 to 4, uint8 of the same shape; 4 is N."""
    return _LETTERS[digits]


def _digit_table() -> Tensor:
    table = torch.full((256,), 5, dtype=torch.uint8)
    for letter in IUPAC:
        table[ord(letter)] = BASES.find(letter) if letter in BASES else 4
    return table


_DIGITS = _digit_table()


class DNATokenizer(TextTokenizer):
    """DNA to ids and back. Text may hold lower case, U and all codes of IUPAC; all but A, C, G, T read as N.

    n_id: what is not known. pad_id, mask_id, begin_id, end_id: the last four ids, never made by `encode`.
    n_concrete: ids below it stand for known bases alone. span: bases a token stands for. step: bases between
    the first ones of two tokens. complement (vocab_size,) int64: the id of each token's other strand; begin
    and end change places, pad, mask and N stay.
    """

    n_concrete: int
    n_id: int
    pad_id: int
    mask_id: int
    begin_id: int
    end_id: int
    span: int
    step: int
    complement: Tensor

    @abstractmethod
    def encode_letters(self, letters: Tensor) -> Tensor:
        """The ids of upper-case letters (`ssm_modal.io.nucleotides`), uint8 (n,), as int64 (tokens,)."""

    @abstractmethod
    def decode_letters(self, ids: Tensor) -> Tensor:
        """The letters of ids (n,) in the vocabulary, uint8; pad, begin and end left out, mask as N."""

    def encode_ids(self, text: str) -> Tensor:
        """As `encode`, int64 (tokens,). Raises LetterError for a letter that is no nucleotide."""
        return self.encode_letters(letters_of(text))

    def encode(self, text: str) -> list[int]:
        return self.encode_ids(text).tolist()

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return text_of(self.decode_letters(torch.tensor(self.check_ids(ids), dtype=torch.int64)))

    def count_bytes(self, ids: Tensor) -> int:
        return self.decode_letters(ids.to(torch.int64)).shape[0]

    def reverse_complement(self, ids: Tensor) -> Tensor:
        """The ids of the other strand, int64 (..., n): `encode(rc(x))` is `reverse_complement(encode(x))`.

        Its own inverse. Raises ValueError for an id outside the vocabulary.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"ids go from {int(ids.min())} to {int(ids.max())}, expected 0 to {self.vocab_size - 1}"
            )
        return self.complement.to(ids.device)[ids.to(torch.int64).flip(-1)]

    def bases_for(self, tokens: int) -> int:
        """Bases that `tokens` neighbouring tokens (1 or more) stand for."""
        return (tokens - 1) * self.step + self.span

    def tokens_in(self, bases: int) -> int:
        """Whole tokens in a stretch of `bases`."""
        return max(0, (bases - self.span) // self.step + 1)

    def _place_specials(self, first: int, complement: Tensor) -> None:
        """Give the special ids from `first` on, and complete `complement` (first,) for them."""
        self.pad_id, self.mask_id, self.begin_id, self.end_id = range(first, first + len(SPECIALS))
        self.vocab_size = first + len(SPECIALS)
        self.eos_id = self.end_id
        specials = torch.tensor([self.pad_id, self.mask_id, self.end_id, self.begin_id])
        self.complement = torch.cat([complement, specials])

    def _without_borders(self, ids: Tensor) -> Tensor:
        """`ids` (n,) without pad, begin and end."""
        return ids[(ids < self.pad_id) | (ids == self.mask_id)]


class NucleotideTokenizer(DNATokenizer):
    """One id a base: A 0, C 1, G 2, T 3, N 4 (all other letters too); pad 5, mask 6, begin 7, end 8."""

    n_concrete = 4
    n_id = 4
    span = step = 1

    def __init__(self) -> None:
        self._place_specials(5, torch.tensor([3, 2, 1, 0, 4]))

    def encode_letters(self, letters: Tensor) -> Tensor:
        return digits_of(letters)

    def decode_letters(self, ids: Tensor) -> Tensor:
        return letters_from(self._without_borders(ids).clamp(max=4))

    def stream(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _NucleotideStream(self)

    def to_config(self) -> dict[str, Any]:
        return {KIND: "nucleotide"}


class _NucleotideStream(StreamDecoder):
    def __init__(self, tokenizer: NucleotideTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""

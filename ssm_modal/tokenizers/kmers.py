"""k-mers as ids: one for every base (overlapping), or one for every k bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.tokenizers.base import KIND, StreamDecoder
from ssm_modal.tokenizers.dna import DNATokenizer, digits_of, letters_from

MAX_K = 10
_UNKNOWN = 4


class KmerTokenizer(DNATokenizer):
    """k-mers of A, C, G, T as ids 0 ... 4^k - 1: the number in base 4 with A C G T as 0 1 2 3, first letter
    first.

    n_id 4^k: a k-mer with any other letter. Overlapping: n bases give n - k + 1 ids, one for each base that a
    k-mer begins at; then pad, mask, begin, end. Not overlapping: n // k ids, then one for each base of the
    rest (4^k + 1 ... 4^k + 5 for A C G T N); then pad, mask, begin, end.

    Decoding gives the text back where it is A, C, G, T. Without overlap a k-mer with another letter reads as
    k times N; with overlap each base is read from the k-mers that hold it, so that N stays N and the bases
    around it are known, unless they stand between two N (or an N and the end) with fewer than k of them.
    """

    def __init__(self, k: int = 6, overlapping: bool = False) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_K:
            raise ValueError(f"k is {k!r}, expected a whole number from 1 to {MAX_K}")
        self.k, self.overlapping = k, overlapping
        self.span, self.step = k, 1 if overlapping else k
        self.n_concrete = self.n_id = 4**k
        self._powers = 4 ** torch.arange(k - 1, -1, -1)
        digits = self._digits(torch.arange(4**k))
        known = ((3 - digits).flip(-1) * self._powers).sum(-1)
        rest = [self.n_id]
        if not overlapping:
            first = self.n_id + 1
            rest += [first + 3, first + 2, first + 1, first, first + 4]
        self._place_specials(self.n_id + len(rest), torch.cat([known, torch.tensor(rest)]))

    def encode_letters(self, letters: Tensor) -> Tensor:
        """As for every tokenizer of DNA; overlapping, ValueError for 1 to k - 1 letters: no k-mer."""
        digits = digits_of(letters)
        n = digits.shape[0]
        if self.overlapping:
            if 0 < n < self.k:
                raise ValueError(f"{n} letters hold no {self.k}-mer, expected {self.k} or more")
            return self._kmers(digits.unfold(0, self.k, 1)) if n else digits
        whole = n - n % self.k
        rest = self.n_id + 1 + digits[whole:]
        return torch.cat([self._kmers(digits[:whole].view(-1, self.k)), rest])

    def decode_letters(self, ids: Tensor) -> Tensor:
        tokens = self._without_borders(ids)
        known = tokens < self.n_concrete
        digits = torch.where(known[:, None], self._digits(tokens.clamp(max=self.n_concrete - 1)), _UNKNOWN)
        if not self.overlapping:
            single = (tokens > self.n_id) & (tokens < self.pad_id)
            digits[:, 0] = torch.where(single, tokens - self.n_id - 1, digits[:, 0])
            kept = torch.ones_like(digits, dtype=torch.bool)
            kept[single, 1:] = False
            return letters_from(digits[kept])
        n = tokens.shape[0]
        bases = torch.full((n + self.k - 1 if n else 0,), _UNKNOWN)
        for j in reversed(range(self.k)):
            # Base i is letter j of the k-mer that begins at i - j; the one that begins last decides.
            part = bases[j : j + n]
            bases[j : j + n] = torch.where(known, digits[:, j], part)
        return letters_from(bases)

    def reverse_complement(self, ids: Tensor) -> Tensor:
        """As for every tokenizer of DNA; without overlap it is there where k divides the number of bases
        alone.

        Raises ValueError where ids (..., n) hold a single base, the rest of a text whose length k does not
        divide: the other strand has its k-mers at other places then.
        """
        if not self.overlapping:
            single = ((ids > self.n_id) & (ids < self.pad_id)).nonzero()
            if single.numel():
                raise ValueError(
                    f"ids hold a single base at place {int(single[0, -1])}: {self.k} does not divide the "
                    f"number of bases, so that the other strand has other {self.k}-mers"
                )
        return super().reverse_complement(ids)

    def stream(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _OverlapStream(self, before) if self.overlapping else _KmerStream(self)

    def to_config(self) -> dict[str, Any]:
        return {KIND: "kmer", "k": self.k, "overlapping": self.overlapping}

    def _kmers(self, digits: Tensor) -> Tensor:
        """The ids of digits (tokens, k)."""
        return torch.where((digits == _UNKNOWN).any(-1), self.n_id, (digits * self._powers).sum(-1))

    def _digits(self, ids: Tensor) -> Tensor:
        """The digits (tokens, k) of ids (tokens,) below 4^k."""
        return ids[:, None] // self._powers % 4


class _KmerStream(StreamDecoder):
    def __init__(self, tokenizer: KmerTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


class _OverlapStream(StreamDecoder):
    """Base i is certain once the k-mer that begins there has come; the last k - 1 at the end."""

    def __init__(self, tokenizer: KmerTokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._recent: list[int] = []
        # Bases still to come that the text of `before` ended with.
        self._told = 0
        for token in before:
            self.push(token)
        self._told = tokenizer.k - 1 if self._recent else 0

    def push(self, token: int) -> str:
        tokenizer = self._tokenizer
        (token,) = tokenizer.check_ids([token])
        if token >= tokenizer.pad_id and token != tokenizer.mask_id:
            return ""
        self._recent = [*self._recent, token][-tokenizer.k :]
        letters = tokenizer.decode(self._recent)
        return self._untold(letters[len(self._recent) - 1 : len(self._recent)])

    def finish(self) -> str:
        letters = self._tokenizer.decode(self._recent)
        rest = self._untold(letters[len(self._recent) :])
        self._recent = []
        return rest

    def _untold(self, letters: str) -> str:
        hidden = min(self._told, len(letters))
        self._told -= hidden
        return letters[hidden:]

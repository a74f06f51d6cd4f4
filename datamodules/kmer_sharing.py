"""Which k-mers two sets of sequences share, exactly, either strand: codes in 64 bits, sorted, no sketch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MAX_K = 32
_CHUNK = 1 << 20  # bases whose k-mers stand in memory at once

_DIGITS = np.full(256, 4, dtype=np.uint8)
for _digit, _letter in enumerate(b"ACGT"):
    _DIGITS[_letter] = _digit
_THREE = np.uint8(3)

Letters = NDArray[np.uint8]
Codes = NDArray[np.uint64]


def canonical_kmers(letters: Letters, k: int) -> tuple[Codes, NDArray[np.bool_]]:
    """The k-mers that begin at each base, as the lesser of the code of either strand.

    letters: upper-case ASCII, uint8 (n,). Returns (codes uint64 (n - k + 1,), known bool, False where a k-mer
    holds another letter than A, C, G, T). A code is the number in base 4 with A C G T as 0 to 3.
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k is {k}, expected 1 to {MAX_K}")
    digits: Letters = _DIGITS[letters]
    if len(digits) < k:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.bool_)
    unknown = np.concatenate([[0], np.cumsum(digits == 4)])
    known = unknown[k:] == unknown[:-k]
    own = kmer_codes(digits & _THREE, k)
    other = kmer_codes(_THREE - (digits[::-1] & _THREE), k)[::-1]
    return np.minimum(own, other), known


def kmer_set(sequences: Iterable[Letters], k: int) -> Codes:
    """The distinct known k-mers of `sequences`, either strand, sorted, uint64 (m,)."""
    found: Codes = np.empty(0, dtype=np.uint64)
    for letters in sequences:
        for first in range(0, max(1, len(letters) - k + 1), _CHUNK):
            codes, known = canonical_kmers(letters[first : first + _CHUNK + k - 1], k)
            found = np.union1d(found, codes[known])
    return found


def shared_fraction(letters: Letters, kmers: Codes, k: int, block: int) -> NDArray[np.float64]:
    """For each block of `block` bases (the last perhaps shorter) the part of its known k-mers, of those that
    lie in it as a whole, that stand in the sorted set `kmers`; 0 where it has none. float64 (blocks,)."""
    if block < k:
        raise ValueError(f"block is {block}, expected at least k, {k}")
    n_blocks = -(-len(letters) // block)
    fractions = np.zeros(n_blocks)
    step = max(1, _CHUNK // block)
    for first in range(0, n_blocks, step):
        part = letters[first * block : (first + step) * block]
        codes, known = canonical_kmers(part, k)
        at = np.arange(len(codes))
        inside = known & (at % block <= block - k)
        hit = _stand_in(codes, kmers)
        size = -(-len(part) // block)
        total = np.bincount(at[inside] // block, minlength=size)
        shared = np.bincount(at[inside & hit] // block, minlength=size)
        fractions[first : first + size] = shared / np.maximum(total, 1)
    return fractions


def _stand_in(codes: Codes, kmers: Codes) -> NDArray[np.bool_]:
    """Whether each code is in the sorted set."""
    found = np.zeros(len(codes), dtype=np.bool_)
    if len(kmers):
        # In rising order the search walks through memory instead of jumping about: several times as fast.
        order = np.argsort(codes)
        rising = codes[order]
        place = np.minimum(np.searchsorted(kmers, rising), len(kmers) - 1)
        found[order] = kmers[place] == rising
    return found


def kmer_codes(digits: Letters, k: int) -> Codes:
    """The k-mer that begins at each base of digits 0 to 3 (n,), uint64 (n - k + 1,): by doubling, in
    log2(k) passes."""
    powers: list[Codes] = [digits.astype(np.uint64)]  # codes of 1, 2, 4, ... letters
    while 2 ** len(powers) <= k:
        half = powers[-1]
        width = 2 ** (len(powers) - 1)
        powers.append((half[:-width] << np.uint64(2 * width)) | half[width:])
    n = len(digits) - k + 1
    codes = np.zeros(n, dtype=np.uint64)
    done = 0
    for bit, power in enumerate(powers):
        width = 1 << bit
        if k & width:
            codes = (codes << np.uint64(2 * width)) | power[done : done + n]
            done += width
    return codes

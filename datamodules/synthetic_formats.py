"""The synthetic tasks' sequences, each a pure function of (seed, split, index).

Four formats, after the Mamba paper (arXiv 2312.00752, section 4.1) and Zoology (arXiv 2312.04927):

- `InductionHeads`: one special token somewhere, its answer behind it, the special token again at the end.
- `Copying`: 16 tokens, a gap of fillers, a marker, 16 fillers during which the tokens are repeated in order.
- `SelectiveCopying`: the same with the 16 tokens scattered over the gap.
- `MQAR`: key-value pairs, then every key queried once (multi-query associative recall).

A format's `generate(seed, split, start, stop)` gives the sequences start ... stop - 1 as numpy arrays `ids`
and `labels` (stop - start, length) int64; `labels[:, t]` is what the model is to predict at position t, -100
where nothing is asked.

Randomness is counter based: every sequence owns a fixed block of the Philox 4x64 stream whose key is a hash
of (seed, split, format), so that any range of sequences, asked for in any order, by any process or thread and
on any platform, holds the same tokens, and no two splits share a stream. Only `random_raw` of numpy is used:
unlike its distributions it is the published algorithm and does not change between versions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar, TypedDict

import numpy as np
import numpy.typing as npt

IGNORE = -100
SPLITS = ("train", "validation", "test")

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

# Words are turned into numbers this many at a time, so that temporaries stay in the cache.
_CHUNK = 1 << 15


class Sequences(TypedDict):
    """`ids` and `labels`, both (sequences, length) int64; labels are -100 where nothing is predicted."""

    ids: Ints
    labels: Ints


def stream_key(*parts: object) -> int:
    """A 128-bit Philox key for a stream named by `parts`: unlike names give unrelated streams."""
    name = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=16, person=b"ssm_modal data").digest(), "little"
    )


def raw_words(key: int, start: int, sequences: int, per_sequence: int) -> Words:
    """The blocks of the sequences start ... start + sequences - 1: (sequences, per_sequence) uint64.

    Philox gives 4 words a count, so a sequence owns ceil(per_sequence / 4) counts.
    """
    counts = -(-per_sequence // 4)
    stream = np.random.Philox(key=key, counter=start * counts)
    words = stream.random_raw(sequences * counts * 4).reshape(sequences, counts * 4)
    return words[:, :per_sequence]


def integers(words: Words, bound: int) -> Ints:
    """Two integers uniform over 0 ... bound - 1 from each word: (rows, k) uint64 to (rows, 2 k) int64.

    The high half of a 32-bit times 32-bit product; no value is favoured by more than bound / 2^32.
    """
    out = np.empty((words.shape[0], words.shape[1], 2), np.int64)
    flat = out.reshape(-1, 2)
    source = np.ascontiguousarray(words).reshape(-1)
    factor, half, low = np.uint64(bound), np.uint64(32), np.uint64(0xFFFFFFFF)
    for at in range(0, source.size, _CHUNK):
        part = source[at : at + _CHUNK]
        flat[at : at + _CHUNK, 0] = ((part & low) * factor) >> half
        flat[at : at + _CHUNK, 1] = ((part >> half) * factor) >> half
    return out.reshape(words.shape[0], 2 * words.shape[1])


def fractions(words: Words) -> npt.NDArray[np.float64]:
    """A number uniform over [0, 1), a multiple of 2^-53, from each word."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(words: Words, bound: int) -> Ints:
    """k different integers of 0 ... bound - 1 a row, every subset alike, from (rows, k) words (Floyd's
    algorithm).

    The order within a row is not random: sort it, or deal it out by `shuffled`.
    """
    rows, k = words.shape
    chosen = np.empty((rows, k), np.int64)
    unit = fractions(words)
    for i in range(k):
        top = bound - k + i
        # 53 random bits: far below 2^53, a candidate is never rounded up to top + 1.
        candidate = (unit[:, i] * (top + 1)).astype(np.int64)
        taken = (chosen[:, :i] == candidate[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, candidate)
    return chosen


def shuffled(values: Ints, words: Words) -> Ints:
    """Each row of `values` (rows, k) in an order drawn from `words` (rows, k)."""
    return np.take_along_axis(values, np.argsort(words, axis=1, kind="stable"), axis=1)


@dataclass(frozen=True)
class Format(ABC):
    """A task's sequences of one length. Subclasses are the four tasks."""

    length: int
    vocab_size: int = 16

    task: ClassVar[str]

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The least length that this format fits."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy a token of a model that guesses among the tokens that can be the answer."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """How many positions of a sequence carry a label."""

    @property
    @abstractmethod
    def words(self) -> int:
        """How many 64-bit random words a sequence owns."""

    @abstractmethod
    def build(self, words: Words) -> Sequences:
        """The sequences made of `words` (sequences, `self.words`)."""

    def __post_init__(self) -> None:
        for name in ("length", "vocab_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}, expected a whole number")
        if self.length < self.shortest:
            raise ValueError(f"length is {self.length}, expected at least {self.shortest} for {self.task}")

    def generate(self, seed: int, split: str, start: int, stop: int) -> Sequences:
        """The sequences start ... stop - 1 of a split ("train", "validation" or "test") of a seed."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if not 0 <= start <= stop:
            raise ValueError(f"start is {start} and stop is {stop}, expected 0 <= start <= stop")
        key = stream_key(self.task, split, int(seed), *astuple(self))
        return self.build(raw_words(key, start, stop - start, self.words))


@dataclass(frozen=True)
class InductionHeads(Format):
    """The special token, once at a position uniform over 0 ... length - 3, then its answer, an ordinary
    token; every other token ordinary and uniform; the last token is the special one again and the answer is
    its label.

    Ordinary tokens are 0 ... vocab_size - 2, the special token is vocab_size - 1. Mamba, section 4.1.2.
    """

    task: ClassVar[str] = "induction_heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at least 3 for {self.task}")

    @property
    def special(self) -> int:
        return self.vocab_size - 1

    @property
    def shortest(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    @property
    def answers(self) -> int:
        return 1

    @property
    def words(self) -> int:
        return 1 + (self.length + 1) // 2

    def build(self, words: Words) -> Sequences:
        ids = integers(words[:, 1:], self.vocab_size - 1)[:, : self.length]
        position = (fractions(words[:, 0]) * (self.length - 2)).astype(np.int64)
        rows = np.arange(len(ids))
        ids[rows, position] = self.special
        ids[:, -1] = self.special
        labels = np.full(ids.shape, IGNORE, np.int64)
        labels[:, -1] = ids[rows, position + 1]
        return {"ids": ids, "labels": labels}


@dataclass(frozen=True)
class Copying(Format):
    """`tokens` ordinary tokens, length - 2 * tokens - 1 fillers, a marker, then `tokens` fillers at which the
    tokens are to be repeated in order: the labels stand on those last fillers.

    Ordinary tokens are 0 ... vocab_size - 3, the filler is vocab_size - 2, the marker vocab_size - 1. Mamba,
    section 4.1.1 (16 tokens, of 14).
    """

    tokens: int = 16

    task: ClassVar[str] = "copying"

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens!r}, expected a whole number of at least 1")
        super().__post_init__()
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at least 3 for {self.task}")

    @property
    def filler(self) -> int:
        return self.vocab_size - 2

    @property
    def marker(self) -> int:
        return self.vocab_size - 1

    @property
    def shortest(self) -> int:
        return 2 * self.tokens + 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    @property
    def answers(self) -> int:
        return self.tokens

    @property
    def words(self) -> int:
        return self._token_words

    @property
    def _token_words(self) -> int:
        return (self.tokens + 1) // 2

    def _positions(self, words: Words) -> Ints:
        return np.broadcast_to(np.arange(self.tokens), (len(words), self.tokens))

    def build(self, words: Words) -> Sequences:
        copied = integers(words[:, : self._token_words], self.vocab_size - 2)[:, : self.tokens]
        ids = np.full((len(words), self.length), self.filler, np.int64)
        np.put_along_axis(ids, self._positions(words), copied, axis=1)
        ids[:, self.length - self.tokens - 1] = self.marker
        labels = np.full(ids.shape, IGNORE, np.int64)
        labels[:, self.length - self.tokens :] = copied
        return {"ids": ids, "labels": labels}


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """As `Copying`, the tokens at positions drawn without replacement among the first length - tokens - 1."""

    task: ClassVar[str] = "selective_copying"

    @property
    def words(self) -> int:
        return self._token_words + self.tokens

    def _positions(self, words: Words) -> Ints:
        return np.sort(choose(words[:, self._token_words :], self.length - self.tokens - 1), axis=1)


@dataclass(frozen=True)
class MQAR(Format):
    """Multi-query associative recall: `pairs` keys, each followed by its value, then each key queried once.

    Keys are drawn without replacement from 1 ... V/2 - 1, values without replacement from V/2 ... V - 1.
    After the 2 * pairs tokens of the pairs come (length - 2 * pairs) // 2 slots of two positions; every key
    takes the first position of a slot of its own, slots drawn without replacement with probability
    proportional to (slot + 1)^(power_a - 1), the first pair first. The label, on the query's position, is the
    key's value. All other positions after the pairs hold tokens uniform over the vocabulary, or 0 with
    `random_non_queries=False`.

    Zoology (arXiv 2312.04927), whose generator (`multiquery_ar` in HazyResearch/zoology) this follows.
    Differences: every sequence has random numbers of its own and is made when asked for, where the generator
    draws a data set from one global state; slots are drawn by exponential races, which has the distribution
    of numpy's weighted `choice` without replacement; `num_passes` is left out; an odd length is refused there
    and so it is here.
    """

    vocab_size: int = 8192
    pairs: int = 8
    power_a: float = 0.01
    random_non_queries: bool = True

    task: ClassVar[str] = "mqar"

    def __post_init__(self) -> None:
        if isinstance(self.pairs, bool) or not isinstance(self.pairs, int) or self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs!r}, expected a whole number of at least 1")
        if not self.power_a > 0:
            raise ValueError(f"power_a is {self.power_a!r}, expected more than 0")
        super().__post_init__()
        if self.length % 2:
            raise ValueError(f"length is {self.length}, expected an even length for {self.task}")
        if self.vocab_size % 2 or self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, expected an even number of at least {2 * self.pairs + 2} "
                f"for {self.pairs} pairs"
            )

    @property
    def shortest(self) -> int:
        return 4 * self.pairs

    @property
    def chance(self) -> float:
        return 2 / self.vocab_size

    @property
    def answers(self) -> int:
        return self.pairs

    @property
    def slots(self) -> int:
        return (self.length - 2 * self.pairs) // 2

    @property
    def words(self) -> int:
        # Subset and order of the keys, the same of the values, the slots' races, two fillers a word.
        return 4 * self.pairs + 2 * self.slots

    def build(self, words: Words) -> Sequences:
        n = self.pairs
        half = self.vocab_size // 2
        drawn = np.split(words, np.cumsum([n, n, n, n, self.slots]), axis=1)
        take_keys, order_keys, take_values, order_values, races, noise = drawn
        keys = 1 + shuffled(choose(take_keys, half - 1), order_keys)
        values = half + shuffled(choose(take_values, half), order_values)
        # Sampling without replacement, one draw after another, is the order of arrival of exponential clocks
        # whose rates are the weights (up to 1 - fraction > 0, whose logarithm is finite).
        rate = np.arange(1, self.slots + 1, dtype=np.float64) ** (self.power_a - 1)
        arrival = -np.log1p(-fractions(races)) / rate
        slot = np.argsort(arrival, axis=1, kind="stable")[:, :n]
        at = 2 * n + 2 * slot
        ids = np.zeros((len(words), self.length), np.int64)
        if self.random_non_queries:
            ids[:, 2 * n :] = integers(noise, self.vocab_size)
        ids[:, 0 : 2 * n : 2] = keys
        ids[:, 1 : 2 * n : 2] = values
        np.put_along_axis(ids, at, keys, axis=1)
        labels = np.full(ids.shape, IGNORE, np.int64)
        np.put_along_axis(labels, at, values, axis=1)
        return {"ids": ids, "labels": labels}


FORMATS: dict[str, type[Format]] = {
    cls.task: cls for cls in (InductionHeads, Copying, SelectiveCopying, MQAR)
}


def make_format(task: str, length: int, **options: Any) -> Format:
    """The format of a task by name; `options` are its other fields (`vocab_size`, `pairs`, `tokens`, ...)."""
    if task not in FORMATS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(FORMATS)}")
    cls = FORMATS[task]
    known = [field.name for field in fields(cls) if field.name != "length"]
    for name in options:
        if name not in known:
            raise TypeError(f"{name} is no option of {task}, expected one of {', '.join(known)}")
    return cls(length=length, **options)

"""Packed sequences: validated once, with the lengths on the host and every table on the device.

Sequences of unequal length stand end to end along axis 1 of a batch of one; `cu_seqlens` holds their borders:
sequence i is `[cu_seqlens[i], cu_seqlens[i + 1])`. A model builds one `Sequences` a batch and hands it to
every layer, so no layer reads the device (a read would synchronise and break CUDA and compiled graphs).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkTable:
    """How packed sequences are cut in chunks of at most `chunk_size` steps, no chunk crossing a border.

    start, end: (chunks,) int64, the steps `[start, end)` of each chunk. seq: (chunks,) int64, its sequence.
    first: (sequences + 1,) int64, the chunks of sequence i are `[first[i], first[i + 1])`. All on one device.
    """

    chunk_size: int
    start: Tensor
    end: Tensor
    seq: Tensor
    first: Tensor

    @property
    def n_chunks(self) -> int:
        return self.start.shape[0]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Packed sequences of the given `lengths`; their borders `cu_seqlens` (sequences + 1,) int64."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    _tables: dict[int, ChunkTable] = field(default_factory=dict, repr=False)
    _extra: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str | None = None) -> Sequences:
        """Sequences of `lengths` (each at least 0, at least one of them) end to end."""
        host = tuple(int(n) for n in lengths)
        if not host:
            raise ValueError("lengths is empty, expected at least one sequence")
        for i, n in enumerate(host):
            if n < 0:
                raise ValueError(f"lengths[{i}] is {n}, expected 0 or more")
        borders = torch.zeros(len(host) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(host, dtype=torch.int64), 0, out=borders[1:])
        return cls(host, borders.to(device, non_blocking=True) if device is not None else borders)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequences, length: int, device: torch.device) -> Sequences:
        """Validate `cu_seqlens` against a packed axis of `length` steps (reads the device once).

        Raises TypeError for a wrong type or dtype, ValueError for borders that do not start at 0, that fall,
        or that do not end at `length`.
        """
        if isinstance(cu_seqlens, Sequences):
            if cu_seqlens.total != length:
                raise ValueError(
                    f"cu_seqlens covers {cu_seqlens.total} steps, expected {length}, the length of the input"
                )
            if cu_seqlens.cu_seqlens.device != device:
                raise ValueError(
                    f"cu_seqlens is on {cu_seqlens.cu_seqlens.device}, but the input is on {device}; "
                    "move it with Sequences.to"
                )
            return cu_seqlens
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be a tensor or Sequences, got {type(cu_seqlens).__name__}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32 or int64")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,), 2 or more"
            )
        if cu_seqlens.device != device:
            raise ValueError(
                f"cu_seqlens is on {cu_seqlens.device}, but the input is on {device}; move one of them"
            )
        host = [int(n) for n in cu_seqlens.tolist()]
        if host[0] != 0:
            raise ValueError(f"cu_seqlens[0] is {host[0]}, expected 0")
        for i, (a, b) in enumerate(itertools.pairwise(host)):
            if b < a:
                raise ValueError(
                    f"cu_seqlens falls from {a} to {b} at index {i + 1}, expected rising borders"
                )
        if host[-1] != length:
            raise ValueError(f"cu_seqlens ends at {host[-1]}, expected {length}, the length of the input")
        return cls(tuple(b - a for a, b in itertools.pairwise(host)), cu_seqlens.to(torch.int64))

    @property
    def n(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Steps of all sequences together."""
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First step of each sequence, on the host."""
        out, at = [], 0
        for n in self.lengths:
            out.append(at)
            at += n
        return tuple(out)

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences with their tables on `device`."""
        if self.cu_seqlens.device == torch.device(device):
            return self
        return Sequences(self.lengths, self.cu_seqlens.to(device))

    def seq_index(self) -> Tensor:
        """(total,) int64: the sequence each step belongs to."""
        if "seq_index" not in self._extra:
            host = torch.repeat_interleave(
                torch.arange(self.n), torch.tensor(self.lengths, dtype=torch.int64)
            )
            self._extra["seq_index"] = host.to(self.cu_seqlens.device)
        return self._extra["seq_index"]

    def positions(self) -> Tensor:
        """(total,) int64: the step inside its own sequence, counted from 0."""
        if "positions" not in self._extra:
            steps = torch.arange(self.total, device=self.cu_seqlens.device)
            self._extra["positions"] = steps - self.cu_seqlens[:-1][self.seq_index()]
        return self._extra["positions"]

    def chunks(self, chunk_size: int) -> ChunkTable:
        """The chunk table for `chunk_size`, built once and kept. A sequence of length 0 has no chunk."""
        if chunk_size not in self._tables:
            start, end, seq, first = [], [], [], [0]
            for i, (at, n) in enumerate(zip(self.starts, self.lengths)):
                for offset in range(0, n, chunk_size):
                    start.append(at + offset)
                    end.append(at + min(offset + chunk_size, n))
                    seq.append(i)
                first.append(len(start))
            table = (
                torch.tensor([start, end, seq], dtype=torch.int64).reshape(3, -1).to(self.cu_seqlens.device)
            )
            borders = torch.tensor(first, dtype=torch.int64).to(self.cu_seqlens.device)
            self._tables[chunk_size] = ChunkTable(chunk_size, table[0], table[1], table[2], borders)
        return self._tables[chunk_size]


def check_packing(
    op: str, name: str, lead: Tensor, cu_seqlens: Tensor | Sequences | None
) -> tuple[Sequences | None, int, str]:
    """The validated sequences along axis 1 of `lead`, and how many rows a state has beside it, in what.

    lead: (batch, length, ...), the argument called `name`; its batch is 1 where there are `cu_seqlens`. The
    rows are the batch, or the sequences. Raises ValueError for another batch, and as
    `Sequences.from_cu_seqlens`.
    """
    if cu_seqlens is None:
        return None, lead.shape[0], "batch"
    if lead.shape[0] != 1:
        raise ValueError(
            f"{op}: {name} has batch {lead.shape[0]}, expected 1 with cu_seqlens (sequences stand end to end)"
        )
    seqs = Sequences.from_cu_seqlens(cu_seqlens, lead.shape[1], lead.device)
    return seqs, seqs.n, "sequences"


def unpacked(seqs: Sequences | None) -> tuple[Tensor | None, list[int]]:
    """(cu_seqlens, lengths) of packed sequences, what a custom op takes and `cached_sequences` turns back."""
    return (None, []) if seqs is None else (seqs.cu_seqlens, list(seqs.lengths))


_CACHE: OrderedDict[tuple[tuple[int, ...], torch.device], Sequences] = OrderedDict()
_CACHE_SIZE = 16


def cached_sequences(cu_seqlens: Tensor | None, lengths: Sequence[int]) -> Sequences | None:
    """The `Sequences` of these lengths on this device, built once while it stays among the last used.

    For custom ops, which take tensors and numbers only: so no layer builds or copies the tables again.
    """
    if cu_seqlens is None:
        return None
    key = (tuple(lengths), cu_seqlens.device)
    seqs = _CACHE.pop(key, None)
    if seqs is None:
        # A copy: the caller may write the next batch's borders into the same tensor.
        seqs = Sequences(key[0], cu_seqlens.to(torch.int64, copy=True))
    _CACHE[key] = seqs
    while len(_CACHE) > _CACHE_SIZE:
        _CACHE.popitem(last=False)
    return seqs

"""How the chunked torch form lays out time: a chunk is a row.

States are (rows, groups, d_state, channels of a group), so that the innermost loop runs over channels. Steps
that pad a chunk have dt = 0 and x = 0: they hand the state through, in either direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.sequences import ChunkTable, Sequences

MAX_CHUNK = 64


def chunk_size(longest: int) -> int:
    """Steps of a chunk where the longest sequence has `longest` steps."""
    return max(1, min(MAX_CHUNK, math.isqrt(max(longest - 1, 0)) + 1))


@dataclass(frozen=True)
class Cut:
    """How the time axis becomes rows of `size` steps; `table` for packed sequences."""

    size: int
    batch: int
    length: int
    table: ChunkTable | None

    @classmethod
    def of(cls, u: Tensor, seqs: Sequences | None) -> Cut:
        size = chunk_size(max(seqs.lengths) if seqs is not None else u.shape[1])
        return cls(size, u.shape[0], u.shape[1], seqs.chunks(size) if seqs is not None else None)

    @property
    def per_batch(self) -> int:
        return -(-self.length // self.size)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.batch * self.per_batch if self.table is None else self.table.n_chunks

    def rows(self, x: Tensor) -> Tensor:
        """(batch, length, ...) -> (rows, size, ...), zeros where a chunk is padded."""
        rest = x.shape[2:]
        if self.table is None:
            missing = self.per_batch * self.size - self.length
            if missing:
                x = F.pad(x, (*(0, 0) * len(rest), 0, missing))
            return x.reshape(self.batch * self.per_batch, self.size, *rest)
        at = self.table.start.unsqueeze(1) + torch.arange(self.size, device=x.device)
        inside = at < self.table.end.unsqueeze(1)
        at = at.clamp(max=max(self.length - 1, 0))
        taken = x[0].index_select(0, at.reshape(-1)).reshape(*at.shape, *rest)
        return taken.masked_fill_(~inside.reshape(*at.shape, *(1 for _ in rest)), 0)

    def unrows(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        rest = x.shape[2:]
        if self.table is None:
            return x.reshape(self.batch, self.per_batch * self.size, *rest)[:, : self.length]
        # The chunks of the table stand in the order of time.
        steps = torch.arange(self.length, device=x.device)
        chunk = torch.searchsorted(self.table.start, steps, right=True) - 1
        return x[chunk, steps - self.table.start[chunk]].unsqueeze(0)


@dataclass(frozen=True)
class Rows:
    """The op's inputs in rows, widened.

    dt, x = dt * u: (rows, size, groups, 1, channels). A, A_log2 = A * log2(e): (groups, d_state, channels),
    as exp2 is many times faster than exp on the CPU. B, C: (rows, size, groups, d_state).
    """

    dt: Tensor
    x: Tensor
    A: Tensor
    A_log2: Tensor
    B: Tensor
    C: Tensor

    @property
    def n(self) -> int:
        return self.dt.shape[0]

    @property
    def size(self) -> int:
        return self.dt.shape[1]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        groups, d_state, channels = self.A.shape
        return groups, d_state, channels

    def order(self, reverse: bool) -> range:
        """Steps of a chunk in the order of the scan."""
        return range(self.size - 1, -1, -1) if reverse else range(self.size)


def in_groups(state: Tensor, groups: int) -> Tensor:
    """(rows, d_inner, d_state) -> (rows, groups, d_state, channels)."""
    rows, d_inner, d_state = state.shape
    return state.reshape(rows, groups, d_inner // groups, d_state).transpose(2, 3).contiguous()


def from_groups(state: Tensor) -> Tensor:
    """The inverse of `in_groups`."""
    rows, groups, d_state, channels = state.shape
    return state.transpose(2, 3).reshape(rows, groups * channels, d_state)


def prepare(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cut: Cut) -> Rows:
    """The inputs of the op in rows; dt: the step sizes, after bias and softplus."""
    groups = B.shape[2]
    d_inner, d_state = A.shape
    wide = dt.dtype

    def channels(t: Tensor) -> Tensor:
        return cut.rows(t).reshape(cut.n, cut.size, groups, 1, d_inner // groups)

    A = A.reshape(groups, d_inner // groups, d_state).transpose(1, 2).contiguous()
    return Rows(
        dt=channels(dt),
        x=channels(dt * u),
        A=A,
        A_log2=A * math.log2(math.e),
        B=cut.rows(B.to(wide)),
        C=cut.rows(C.to(wide)),
    )

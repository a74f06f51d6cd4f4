"""The classification head: one vector a sequence, pooled over its steps, to logits over classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.state import State

Pooling = Literal["mean", "last", "max"]


@dataclass(frozen=True)
class PoolingState(State):
    """What a pooling has seen. total: (rows, d_model) fp32 (fp64 with fp64): the sum over the steps, the last
    step or the greatest of each channel. count: (rows,) int64, the steps."""

    wide: ClassVar[frozenset[str]] = frozenset({"total"})
    total: Tensor
    count: Tensor


class ClassificationHead(nn.Module):
    """Backbone outputs to logits (rows, n_classes): pooled over each sequence, dropped out, projected.

    pooling: "mean" over the steps, the "last" step, or the "max" of each channel. Steps may come in chunks:
    `pool` takes up what was pooled before. A sequence without a step is pooled to zeros.
    """

    def __init__(self, d_model: int, n_classes: int, pooling: Pooling = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.proj = nn.Linear(d_model, n_classes)

    def pool(
        self, hidden: Tensor, state: PoolingState | None = None, *, seqs: Sequences | None = None
    ) -> PoolingState:
        """hidden: (batch, length, d_model), or (1, total, d_model) packed by `seqs`, one row a sequence."""
        hidden = hidden.to(state_dtype(hidden.dtype))
        if seqs is None:
            lengths = [hidden.shape[1]] * hidden.shape[0]
            count = torch.full((len(lengths),), hidden.shape[1], dtype=torch.int64, device=hidden.device)
        else:
            lengths, count = list(seqs.lengths), seqs.cu_seqlens.diff()
        here = self._reduced(hidden, lengths)
        if state is None:
            return PoolingState(here, count)
        if self.pooling == "mean":
            total = state.total + here
        elif self.pooling == "last":
            total = torch.where(count[:, None] > 0, here, state.total)
        else:
            seen, new = (state.count > 0)[:, None], (count > 0)[:, None]
            total = torch.where(seen & new, torch.maximum(state.total, here), state.total + here)
        return PoolingState(total, state.count + count)

    def _reduced(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """(rows, d_model) of the steps at hand alone, zeros for a row without one."""
        reduce = _REDUCE[self.pooling]
        length = lengths[0] if lengths else 0
        if all(n == length for n in lengths):
            rows = hidden.reshape(len(lengths), length, hidden.shape[-1])
            return reduce(rows) if length else rows.new_zeros(len(lengths), rows.shape[-1])
        # A reduction a sequence: exact, and in the same order every time, which atomic adds on a GPU are not.
        pieces = hidden[0].split(lengths)
        return torch.cat([reduce(p[None]) if len(p) else p.new_zeros(1, p.shape[-1]) for p in pieces])

    def vectors(self, state: PoolingState) -> Tensor:
        """(rows, d_model): what has been pooled so far."""
        if self.pooling == "mean":
            return state.total / state.count.clamp(min=1)[:, None]
        return state.total

    def logits(self, state: PoolingState) -> Tensor:
        """(rows, n_classes) of what has been pooled so far."""
        pooled = self.vectors(state).to(self.proj.weight.dtype)
        return self.proj(pooled if self.dropout is None else self.dropout(pooled))

    def forward(self, hidden: Tensor, *, seqs: Sequences | None = None) -> Tensor:
        """As `pool`, then `logits`."""
        return self.logits(self.pool(hidden, seqs=seqs))

    def init_state(
        self, rows: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PoolingState:
        """The state before the first step; device and dtype default to the parameters'."""
        weight = self.proj.weight
        device, dtype = device or weight.device, state_dtype(dtype or weight.dtype)
        total = torch.zeros(rows, weight.shape[1], device=device, dtype=dtype)
        return PoolingState(total, torch.zeros(rows, dtype=torch.int64, device=device))


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(1)


def _last(rows: Tensor) -> Tensor:
    return rows[:, -1]


def _greatest(rows: Tensor) -> Tensor:
    return rows.amax(1)


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"mean": _sum, "last": _last, "max": _greatest}

"""Pooling along the length by Linears, and the waiting steps that make it causal and a stream.

SaShiMi (Goel et al., arXiv 2202.09729, section 4.2): down-pooling lays `pool` steps side by side and maps
them to one, up-pooling maps one step to `pool` of them and shifts the result, so that no step sees a later
one. The paper shifts by `pool` steps; here it is pool - 1, the least that is causal: frame k has seen the
steps to k * pool + pool - 1, and that step is the first it is added to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.kernels.sequences import Sequences


class DownPool(nn.Module):
    """(batch, frames * pool, d_in) to (batch, frames, d_out): each `pool` steps through one Linear."""

    def __init__(self, d_in: int, d_out: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.proj = nn.Linear(pool * d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d_in = x.shape
        return self.proj(x.reshape(batch, length // self.pool, self.pool * d_in))


class UpPool(nn.Module):
    """(batch, frames, d_in) to (batch, frames * pool, d_out): each frame to `pool` steps by one Linear."""

    def __init__(self, d_in: int, d_out: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.proj = nn.Linear(d_in, pool * d_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, _ = x.shape
        y = self.proj(x)
        return y.reshape(batch, frames * self.pool, y.shape[-1] // self.pool)


def queue_through(
    held: Tensor, waiting: Sequence[int], x: Tensor, taken: Sequence[int], seqs: Sequences | None
) -> tuple[Tensor, Tensor]:
    """Append steps to a queue a row and take some from its front.

    held: (rows, slots, d): the steps that wait, of which each row's first `waiting` count, zeros behind them.
    x: (rows, length, d), or (1, total, d) packed by `seqs`: what is appended. taken: how many steps each row
    gives, so that at most `slots` stay. Without `seqs` the rows have the same `waiting` and `taken`.

    Returns (the steps taken, as x is laid out: (rows, taken, d) or (1, their sum, d); the new `held`).
    """
    slots, device = held.shape[1], x.device
    held = held.to(x.dtype)
    if seqs is None:
        stream = torch.cat([held[:, : waiting[0]], x], dim=1)
        rest = stream[:, taken[0] :]
        return stream[:, : taken[0]], F.pad(rest, (0, 0, 0, slots - rest.shape[1]))
    source = torch.cat([held.flatten(0, 1), x[0]])
    table = torch.tensor([list(waiting), list(taken), list(seqs.lengths)], dtype=torch.int64).to(device)
    waits, gives, lengths = table
    rows = torch.arange(seqs.n, device=device)
    # Step s of a row's stream stands among the held ones where s < waiting, else in what was appended.
    appended = seqs.cu_seqlens[:-1] + held.shape[0] * slots - waits

    def places(step: Tensor, row: Tensor) -> Tensor:
        return torch.where(step < waits[row], row * slots + step, appended[row] + step)

    row = torch.repeat_interleave(rows, gives, output_size=sum(taken))
    step = torch.arange(row.shape[0], device=device) - (gives.cumsum(0) - gives)[row]
    out = source.index_select(0, places(step, row))
    left = gives[:, None] + torch.arange(slots, device=device)
    there = left < (waits + lengths)[:, None]
    index = torch.where(there, places(left, rows[:, None]), 0)
    kept = source.index_select(0, index.flatten()).view(seqs.n, slots, -1)
    return out[None], kept.masked_fill(~there[:, :, None], 0)

"""The carry over chunks: a linear recurrence with given decays, itself in chunks, so no long loop is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssm_modal.kernels.sequences import ChunkTable

# Up to here a plain loop is the shortest way.
LOOP = 16


def carry_states(decay: Tensor, last: Tensor) -> Tensor:
    """h_k = decay_k * h_{k-1} + last_k along axis 1 from h_{-1} = 0: (batch, chunks, ...) -> the same shape.

    Takes about 2 * chunks^(1/2) steps of Python: chunks of chunks, then the carry over those. Any dtype,
    complex too; differentiable by autograd.
    """
    batch, n = last.shape[:2]
    rest = last.shape[2:]
    if n <= LOOP:
        return torch.stack(_loop(decay.unbind(1), last.unbind(1), None), 1) if n else last.clone()
    size = math.isqrt(n - 1) + 1
    groups = -(-n // size)
    missing = groups * size - n
    if missing:
        # Padding stands at the end, where nothing depends on it.
        pad = last.new_zeros(batch, missing, *rest)
        decay, last = torch.cat([decay, pad], 1), torch.cat([last, pad], 1)
    a = decay.reshape(batch, groups, size, *rest).unbind(2)
    b = last.reshape(batch, groups, size, *rest).unbind(2)
    h, whole = b[0], a[0]
    for t in range(1, size):
        h = torch.addcmul(b[t], a[t], h)
        whole = whole * a[t]
    ends = carry_states(whole, h)
    entering = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    out = torch.stack(_loop(a, b, entering), 2)
    return out.reshape(batch, groups * size, *rest)[:, :n]


def _loop(decay: Sequence[Tensor], last: Sequence[Tensor], h: Tensor | None) -> list[Tensor]:
    states = []
    for a, b in zip(decay, last):
        h = b if h is None else torch.addcmul(b, a, h)
        states.append(h)
    return states


def carry_entering(
    decay: Tensor, last: Tensor, initial: Tensor | None, table: ChunkTable | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state entering each chunk and the final state of each sequence.

    decay, last: (batch, chunks, ...), a chunk's whole decay and its last state from zero. initial: (batch,
    ...), or (sequences, ...) with `table`, where batch is 1 and a sequence without chunks hands its state
    through. `reverse`: chunks follow each other from the last to the first.
    """
    n = last.shape[1]
    if table is None:
        if initial is None:
            initial = torch.zeros_like(last[:, 0]) if n else last.new_zeros(last.shape[0], *last.shape[2:])
        if n == 0:
            return last.clone(), initial.clone()
        opening = slice(n - 1, n) if reverse else slice(0, 1)
        entry = initial.unsqueeze(1)
        last = last.clone()
        last[:, opening] += decay[:, opening] * entry
    else:
        filled = table.first[1:] > table.first[:-1]
        if initial is None:
            initial = last.new_zeros(table.first.shape[0] - 1, *last.shape[2:])
        if n == 0:
            return last.clone(), initial.clone()
        # The first and the last chunk of each sequence in scan order; those of empty sequences are
        # overwritten below.
        low, high = table.first[:-1].clamp(max=n - 1), (table.first[1:] - 1).clamp(min=0)
        opens, closes = (high, low) if reverse else (low, high)
        chunk = torch.arange(n, device=last.device)
        is_open = chunk == opens[table.seq]
        mask = is_open.view(1, n, *(1 for _ in last.shape[2:]))
        entry = initial[table.seq].unsqueeze(0)
        last = torch.where(mask, last + decay * entry, last)
        decay = decay.masked_fill(mask, 0)
    states = carry_states(decay.flip(1), last.flip(1)).flip(1) if reverse else carry_states(decay, last)
    shifted = torch.roll(states, -1 if reverse else 1, 1)
    if table is None:
        shifted[:, opening] = entry
        return shifted, states[:, 0 if reverse else -1].clone()
    entering = torch.where(mask, entry, shifted)
    keep = filled.view(-1, *(1 for _ in last.shape[2:]))
    return entering, torch.where(keep, states[0, closes], initial)

"""The carry over chunks: a linear recurrence with given decays, itself in chunks, so no long loop is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.sequences import ChunkTable

# Up to here a plain loop is the shortest way.
LOOP = 16


def carry_states(decay: Tensor, last: Tensor, fresh: Tensor | None = None) -> Tensor:
    """h_k = decay_k * h_{k-1} + last_k along axis 1 from h_{-1} = 0: (batch, chunks, ...) -> the same shape.

    fresh: (chunks,) bool, where h_k = last_k whatever came before: not a decay of 0, for NaN times 0 is NaN.
    Takes about 2 * chunks^(1/2) steps of Python: chunks of chunks, then the carry over those. Any dtype,
    complex too; differentiable by autograd, as often as wanted.
    """
    if torch.is_grad_enabled() and (decay.requires_grad or last.requires_grad):
        return _Carry.apply(decay, last, fresh)
    return _carried(decay, last, fresh)


class _Carry(torch.autograd.Function):
    """`carry_states` with its gradient, which is a carry too, from the last chunk to the first:

        g_k = dout_k + conj(decay_{k+1}) g_{k+1},   dlast_k = g_k,   ddecay_k = g_k conj(h_{k-1})

    Through the loops autograd would keep and undo every step by itself.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, last: Tensor, fresh: Tensor | None) -> Tensor:
        states = _carried(decay, last, fresh)
        ctx.save_for_backward(decay, fresh, states)
        return states

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, Tensor, None]:
        (dout,) = upstream
        decay, fresh, states = ctx.saved_tensors
        # What enters chunk k from behind is chunk k + 1's: its decay, and whether it starts anew.
        factors = decay.conj().flip(1).roll(1, 1)
        anew = None if fresh is None else fresh.flip(0).roll(1, 0)
        g = carry_states(factors, dout.flip(1), anew).flip(1)
        if not ctx.needs_input_grad[0]:
            return None, g, None
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        ddecay = g * before.conj()
        if fresh is not None:
            ddecay = ddecay.masked_fill(fresh.view(1, -1, *(1 for _ in states.shape[2:])), 0)
        return ddecay, g, None


def _carried(decay: Tensor, last: Tensor, fresh: Tensor | None) -> Tensor:
    """`carry_states` by loops."""
    batch, n = last.shape[:2]
    rest = last.shape[2:]
    if n == 0:
        return last.clone()
    if n <= LOOP:
        flags = None if fresh is None else fresh.unbind(0)
        return torch.stack(_loop(decay.unbind(1), last.unbind(1), flags, None), 1)
    size = math.isqrt(n - 1) + 1
    groups = -(-n // size)
    missing = groups * size - n
    if missing:
        # Padding stands at the end, where nothing depends on it.
        pad = last.new_zeros(batch, missing, *rest)
        decay, last = torch.cat([decay, pad], 1), torch.cat([last, pad], 1)
        fresh = None if fresh is None else F.pad(fresh, (0, missing))
    a = decay.reshape(batch, groups, size, *rest).unbind(2)
    b = last.reshape(batch, groups, size, *rest).unbind(2)
    flags = any_fresh = None
    if fresh is not None:
        table = fresh.view(groups, size)
        flags, any_fresh = table.view(groups, size, *(1 for _ in rest)).unbind(1), table.any(1)
    whole = a[0]
    for t in range(1, size):
        whole = whole * a[t]
    ends = _carried(whole, _loop(a, b, flags, None)[-1], any_fresh)
    entering = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    out = torch.stack(_loop(a, b, flags, entering), 2)
    return out.reshape(batch, groups * size, *rest)[:, :n]


def _loop(
    decay: Sequence[Tensor], last: Sequence[Tensor], fresh: Sequence[Tensor] | None, h: Tensor | None
) -> list[Tensor]:
    """The states after each step from `h`, or from zero."""
    states = []
    for t, (a, b) in enumerate(zip(decay, last)):
        if h is None:
            h = b
        else:
            h = torch.addcmul(b, a, h) if fresh is None else torch.where(fresh[t], b, torch.addcmul(b, a, h))
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
    fresh = None
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
        fresh = chunk == opens[table.seq]
        mask = fresh.view(1, n, *(1 for _ in last.shape[2:]))
        entry = initial[table.seq].unsqueeze(0)
        last = torch.where(mask, last + decay * entry, last)
    if reverse:
        states = carry_states(decay.flip(1), last.flip(1), None if fresh is None else fresh.flip(0)).flip(1)
    else:
        states = carry_states(decay, last, fresh)
    shifted = torch.roll(states, -1 if reverse else 1, 1)
    if table is None:
        shifted[:, opening] = entry
        return shifted, states[:, 0 if reverse else -1].clone()
    entering = torch.where(mask, entry, shifted)
    keep = filled.view(-1, *(1 for _ in last.shape[2:]))
    return entering, torch.where(keep, states[0, closes], initial)

"""One row of the matrix that a selective scan multiplies its input by.

Without D and z the scan is linear in u: y_t = sum_{s <= t} alpha_{t,s} u_s, channel by channel, with

    alpha_{t,s} = <C_t, exp((dt_{s+1} + ... + dt_t) A) dt_s B_s>

("The Hidden Attention of Mamba Models", arXiv 2403.01590, the data-controlled linear operator). For one t all
s follow from one scan the other way: g_t = C_t, g_s = exp(dt_{s+1} A) g_{s+1}, alpha_{t,s} = dt_s <B_s, g_s>.
That is a `selective_scan` without an input, whose initial state is C_t, on the backend that serves any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.scan.op import selective_scan


@dataclass(frozen=True)
class RowCarry:
    """What a chunk of a row hands to the next one, farther from the row's position.

    g: (batch, d_inner, d_state), the g of the chunk's farthest step. dt: (batch, 1, d_inner), its step size.
    """

    g: Tensor
    dt: Tensor

    @classmethod
    def at(cls, C: Tensor, d_inner: int) -> RowCarry:
        """The carry into the first chunk, which holds the position. C: (batch, d_state) or (batch, groups,
        d_state), C of that position."""
        C = C.to(state_dtype(C.dtype))
        grouped = C if C.ndim == 3 else C.unsqueeze(1)
        if d_inner % grouped.shape[1]:
            raise ValueError(f"C has {grouped.shape[1]} groups, expected a divisor of d_inner {d_inner}")
        g = grouped.repeat_interleave(d_inner // grouped.shape[1], dim=1)
        return cls(g, g.new_zeros(g.shape[0], 1, d_inner))  # exp(0 A) is one: no decay yet


def selective_scan_row(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    carry: RowCarry,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, RowCarry]:
    """alpha_{t,s} of one position t for the steps s of a chunk, in the memory of the chunk.

    The first chunk ends with t (in reverse: begins with it) and takes `RowCarry.at(C_t)`; the next ends where
    it began and takes the carry that it returned. Any chunks give the same row.

    Args:
        delta, A, B, delta_bias, delta_softplus, backend: as in `selective_scan`, of the chunk's steps.
        carry: from the chunk nearer to t.
        reverse: the row of a scan with reverse=True, which sees the steps from t on.

    Returns:
        (batch, steps, d_inner) fp32, fp64 for fp64 inputs, and the carry for the next chunk. No gradients are
        recorded.
    """
    wide = state_dtype(delta.dtype)
    with torch.no_grad():
        dt = delta.to(wide)
        if delta_bias is not None:
            dt = dt + delta_bias
        if delta_softplus:
            dt = F.softplus(dt, threshold=20.0)
        if dt.shape[1] == 0:
            return dt, carry
        # g_s decays by the step size of its neighbour on the side of t.
        if reverse:
            decay, far = torch.cat([carry.dt, dt[:, :-1]], dim=1), dt[:, -1:]
        else:
            decay, far = torch.cat([dt[:, 1:], carry.dt], dim=1), dt[:, :1]
        B = B.to(wide)
        nothing = dt.new_zeros(()).expand_as(dt)
        read, g = selective_scan(
            nothing,
            decay,
            A.to(wide),
            B,
            B,
            initial_state=carry.g,
            reverse=not reverse,
            return_final_state=True,
            backend=backend,
        )
        return read.mul_(dt), RowCarry(g, far.clone())

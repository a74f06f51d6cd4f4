"""The selective scan as a plain loop over time. No backend: tests call it by name.

To be read against "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
algorithm 2 and equations 2-4.

    symbol here        paper                 meaning
    u                  x                     input of the scan
    delta              parameter of Delta    step size before the bias and the softplus
    dt                 Delta                 step size
    A                  A                     diagonal of the state matrix
    B, C               B, C                  input and output maps, functions of the input
    h                  h                     state
    D, z               -                     skip connection and gate of the block around the scan (figure 3)
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.sequences import Sequences


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments, shapes and results of `selective_scan`; differentiable by autograd, fp64 with fp64 inputs.

    Inputs of 16 bits are widened to fp32 first; the output has the dtype of u.
    """
    wide = state_dtype(u.dtype)
    batch, length, d_inner = u.shape
    d_state = A.shape[1]

    # (batch, length, groups, d_state) -> (batch, length, d_inner, d_state): a group serves d_inner / groups
    # neighbouring channels.
    B, C = (
        (m if m.ndim == 4 else m.unsqueeze(2)).to(wide).repeat_interleave(d_inner // _groups(m), dim=2)
        for m in (B, C)
    )
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt, threshold=20.0)

    if cu_seqlens is None:
        spans = [(0, length)]
        rows = batch
    else:
        spans = _spans(cu_seqlens)
        rows = len(spans)
    if initial_state is None:
        initial_state = torch.zeros(rows, d_inner, d_state, dtype=wide, device=u.device)

    ys: list[Tensor | None] = [None] * length
    finals = []
    for i, (start, end) in enumerate(spans):
        h = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        for t in reversed(range(start, end)) if reverse else range(start, end):
            step = dt[:, t, :, None]
            A_bar = torch.exp(step * A)  # equation 4, zero-order hold
            B_bar = step * B[:, t]  # the first-order form of equation 4's B_bar
            h = A_bar * h + B_bar * x[:, t, :, None]  # equation 2a
            ys[t] = (C[:, t] * h).sum(-1)  # equation 2b
        finals.append(h)
    y = torch.stack([part for part in ys if part is not None], dim=1) if length else x
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    out = y.to(u.dtype)
    return (out, torch.cat(finals)) if return_final_state else out


def _groups(m: Tensor) -> int:
    return m.shape[2] if m.ndim == 4 else 1


def _spans(cu_seqlens: Tensor | Sequences) -> list[tuple[int, int]]:
    borders = (cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Sequences) else cu_seqlens).tolist()
    return list(pairwise(borders))

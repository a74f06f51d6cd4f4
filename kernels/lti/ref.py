"""The time-invariant scan of S4D as a plain loop over time. No backend: tests call it by name.

To be read against "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv
2206.11893): a diagonal system, discretised by zero-order hold.

    symbol here    paper      meaning
    u              u          input
    dt             Delta      step size, one a channel
    A, B, C        A, B, C    diagonal complex system; half of its conjugate pairs, hence y = 2 Re(...)
    x              x          complex state
    D, z           D, -       skip connection, gate
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import complex_dtype, state_dtype
from ssm_modal.kernels.sequences import Sequences


def lti_scan_ref(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments, shapes and results of `lti_scan`; differentiable by autograd, fp64 with fp64 inputs."""
    wide = state_dtype(u.dtype)
    batch, length = u.shape[:2]
    inputs = u.to(wide)

    step = dt.to(A.dtype).unsqueeze(-1)
    A_bar = torch.exp(step * A)  # zero-order hold
    held = torch.expm1(step * A) / torch.where(A == 0, 1, A)  # (A_bar - 1) / A
    B_bar = torch.where(A == 0, step, held) * B

    if cu_seqlens is None:
        spans = [(0, length)]
        rows = batch
    else:
        borders = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Sequences) else cu_seqlens
        spans = list(pairwise(borders.tolist()))
        rows = len(spans)
    if initial_state is None:
        initial_state = u.new_zeros(rows, *A.shape, dtype=complex_dtype(u.dtype))

    ys: list[Tensor | None] = [None] * length
    finals = []
    for i, (start, end) in enumerate(spans):
        x = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        for t in reversed(range(start, end)) if reverse else range(start, end):
            x = A_bar * x + B_bar * inputs[:, t, :, None]
            ys[t] = 2 * (C * x).sum(-1).real
        finals.append(x)
    y = torch.stack([part for part in ys if part is not None], dim=1) if length else inputs
    if D is not None:
        y = y + D * inputs
    if z is not None:
        y = y * F.silu(z.to(wide))
    out = y.to(u.dtype)
    return (out, torch.cat(finals)) if return_final_state else out

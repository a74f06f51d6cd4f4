"""Reference of `rms_norm`, in plain torch; also its "torch" backend, on any device in any dtype.

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4), with the residual add in front and the gate of
Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 7 and the gated norm of its block):

    s = x + residual                               h = s, or s * silu(gate) unless norm_before_gate
    out = h / sqrt(mean(h^2) + eps) * weight       (* silu(gate) if norm_before_gate)

With `group_size` the mean runs over each group of that many neighbouring channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import state_dtype


def residual_dtype(residual: torch.dtype, residual_in_fp32: bool) -> torch.dtype:
    """The dtype of the returned sum: fp32 (fp64 for fp64) if asked for, else the residual's own."""
    return state_dtype(residual) if residual_in_fp32 else residual


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    residual_in_fp32: bool = False,
    group_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `rms_norm`; sums in fp32, or in fp64 for fp64 inputs.

    x, residual, gate: (..., dim). weight: (dim,).
    """
    wide = state_dtype(x.dtype)
    h = x.to(wide)
    total = None
    if residual is not None:
        # What is normalised is the sum as it is returned, rounding included: fused equals unfused to the bit,
        # and the backward can start from the sum that was kept.
        total = (h + residual.to(wide)).to(residual_dtype(residual.dtype, residual_in_fp32))
        h = total.to(wide)
    if gate is not None and not norm_before_gate:
        h = h * F.silu(gate.to(wide))
    if group_size is not None:
        h = h.unflatten(-1, (x.shape[-1] // group_size, group_size))
    out = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if group_size is not None:
        out = out.flatten(-2)
    if weight is not None:
        out = out * weight.to(wide)
    if gate is not None and norm_before_gate:
        out = out * F.silu(gate.to(wide))
    out = out.to(x.dtype)
    return out if total is None else (out, total)

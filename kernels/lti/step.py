"""One step of the time-invariant scan, for streaming and generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import FLOATING, check_dtype, check_no_gradient, check_shape, state_dtype
from ssm_modal.kernels.lti.arguments import check_gate, check_system
from ssm_modal.kernels.lti.chunked import zero_order_hold

OP = "lti_scan_step"


def lti_scan_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lti_scan`: returns (out, new_state), `state` stays untouched. Differentiable by autograd.

    u, z, out: (batch, d_inner). dt, D: (d_inner,). A, B, C: (d_inner, d_state) complex.
    state: (batch, d_inner, d_state) complex. Dtypes and errors as in `lti_scan`.
    """
    _check(u, dt, A, B, C, state, D, z)
    return _step(u, dt, A, B, C, state, D, z)


def lti_scan_step_(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """As `lti_scan_step`, but writes the new state into `state` and returns `out` alone.

    Without autograd: raises RuntimeError where gradients are recorded and any argument requires them.
    """
    _check(u, dt, A, B, C, state, D, z)
    check_no_gradient("lti_scan_step_", (u, dt, A, B, C, state, D, z))
    out, new = _step(u, dt, A, B, C, state, D, z)
    state.copy_(new)
    return out


def _step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = state_dtype(u.dtype)
    inputs = u.to(wide)
    w = dt.to(A.dtype).unsqueeze(-1) * A
    if torch.is_grad_enabled() and (dt.requires_grad or A.requires_grad):
        hold = zero_order_hold(dt, A)
    else:  # as good without its derivative, and in single precision
        hold = torch.where(A == 0, dt.unsqueeze(-1), torch.expm1(w) / torch.where(A == 0, 1, A))
    drive = hold * B * inputs.unsqueeze(-1)
    new = torch.addcmul(drive, torch.exp(w), state)
    y = 2 * (C * new).sum(-1).real
    if D is not None:
        y = y + D * inputs
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), new


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
) -> None:
    check_shape(OP, "u", u, ("batch", "d_inner"), "(batch, d_inner)")
    check_dtype(OP, "u", u, FLOATING)
    if not isinstance(state, Tensor):
        raise TypeError(f"{OP}: state must be a tensor, got {type(state).__name__}")
    check_system(OP, u, dt, A, B, C, D, "state", state, u.shape[0], "batch")
    check_gate(OP, u, z)

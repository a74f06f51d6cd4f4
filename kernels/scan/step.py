"""One step of the selective scan: the recurrence of `ref.py` at one moment, for streaming and generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import (
    FLOATING,
    check_d_state,
    check_device,
    check_dtype,
    check_no_gradient,
    check_same,
    check_shape,
    state_dtype,
)
from ssm_modal.kernels.precision import without_autocast

OP = "selective_scan_step"


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step: returns (out, new_state) and leaves `state` untouched. Differentiable by autograd.

    u, delta, z, out: (batch, d_inner). A: (d_inner, d_state). B, C: (batch, d_state) or (batch, groups,
    d_state). D, delta_bias: (d_inner,). state: (batch, d_inner, d_state). Dtypes as in `selective_scan`.

    Raises TypeError and ValueError for wrong dtypes, shapes and devices.
    """
    B, C = _check(u, delta, A, B, C, state, D, z, delta_bias)
    with without_autocast(u.device):
        return _step(u, delta, A, B, C, state, D, z, delta_bias, delta_softplus)


def selective_scan_step_(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """As `selective_scan_step`, but writes the new state into `state` and returns `out` alone.

    Without autograd: raises RuntimeError where gradients are recorded and any argument requires them.
    """
    B, C = _check(u, delta, A, B, C, state, D, z, delta_bias)
    check_no_gradient("selective_scan_step_", (u, delta, A, B, C, state, D, z, delta_bias))
    with without_autocast(u.device):
        out, new = _step(u, delta, A, B, C, state, D, z, delta_bias, delta_softplus)
    state.copy_(new)
    return out


def _step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The step in torch, on checked arguments; B, C: (batch, groups, d_state)."""
    wide = state_dtype(u.dtype)
    batch, d_inner = u.shape
    groups = B.shape[1]
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt, threshold=20.0)
    B, C = B.to(wide), C.to(wide)
    dtx = (dt * x).view(batch, groups, d_inner // groups, 1)
    drive = (dtx * B.unsqueeze(2)).view(batch, d_inner, -1)
    new = torch.addcmul(drive, torch.exp(dt.unsqueeze(-1) * A), state)
    y = (new.view(batch, groups, d_inner // groups, -1) @ C.unsqueeze(-1)).reshape(batch, d_inner)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), new


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check every argument; returns B and C as (batch, groups, d_state)."""
    check_shape(OP, "u", u, ("batch", "d_inner"), "(batch, d_inner)")
    check_dtype(OP, "u", u, FLOATING)
    batch, d_inner = u.shape
    check_shape(OP, "A", A, (d_inner, "d_state"), "(d_inner, d_state)")
    d_state = check_d_state(OP, A)
    check_shape(OP, "delta", delta, (batch, d_inner), "(batch, d_inner), the shape of u")
    if z is not None:
        check_shape(OP, "z", z, (batch, d_inner), "(batch, d_inner), the shape of u")
    both = []
    for name, m in (("B", B), ("C", C)):
        if isinstance(m, Tensor) and m.ndim == 3:
            check_shape(OP, name, m, (batch, "groups", d_state), "(batch, groups, d_state)")
            if m.shape[1] == 0 or d_inner % m.shape[1]:
                raise ValueError(
                    f"{OP}: {name} has {m.shape[1]} groups, expected a divisor of d_inner, which is {d_inner}"
                )
            both.append(m)
        else:
            check_shape(OP, name, m, (batch, d_state), "(batch, d_state) or (batch, groups, d_state)")
            both.append(m.unsqueeze(1))
    if both[0].shape != both[1].shape:
        raise ValueError(
            f"{OP}: B has {both[0].shape[1]} groups and C {both[1].shape[1]}, expected the same number"
        )
    check_same(OP, {"delta": delta, "B": B, "C": C, "z": z}, "u", u)
    check_shape(OP, "state", state, (batch, d_inner, d_state), "(batch, d_inner, d_state)")
    wide = state_dtype(u.dtype)
    for name, p in (("D", D), ("delta_bias", delta_bias)):
        if p is not None:
            check_shape(OP, name, p, (d_inner,), "(d_inner,)")
    for name, p in (("A", A), ("D", D), ("delta_bias", delta_bias), ("state", state)):
        if p is not None:
            check_device(OP, name, p, u.device, "u")
            check_dtype(OP, name, p, (wide,), f"with u in {str(u.dtype).removeprefix('torch.')}")
    return both[0], both[1]

"""One step of the selective scan: the recurrence of `ref.py` at one moment, for streaming and generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import (
    FLOATING,
    Passed,
    check_d_state,
    check_dtype,
    check_flags,
    check_no_gradient,
    check_same,
    check_shape,
    check_wide,
    recording,
    signature,
    state_dtype,
)
from ssm_modal.kernels.custom_ops import goes_straight, written
from ssm_modal.kernels.dispatch import resolve
from ssm_modal.kernels.precision import without_autocast

OP = "selective_scan_step"

_passed = Passed()

torch.library.define(
    "ssm_modal::selective_scan_step",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor state, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus) -> (Tensor, Tensor)",
)
torch.library.define(
    "ssm_modal::selective_scan_step_",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus) -> Tensor",
)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: returns (out, new_state) and leaves `state` untouched.

    u, delta, z, out: (batch, d_inner). A: (d_inner, d_state). B, C: (batch, d_state) or (batch, groups,
    d_state). D, delta_bias: (d_inner,). state: (batch, d_inner, d_state). Dtypes as in `selective_scan`.
    backend: None to choose, "triton" or "torch". Where gradients are recorded "torch" serves, by autograd,
    and "triton", asked for, raises.

    Raises TypeError and ValueError for wrong dtypes, shapes and devices, BackendError where the backend asked
    for cannot serve.
    """
    B, C = _check(u, delta, A, B, C, state, D, z, delta_bias, delta_softplus)
    given = (u, delta, A, B, C, state, D, z, delta_bias)
    if resolve(OP, u.device, u.dtype, backend, recording(given)) == "torch":
        with without_autocast(u.device):
            return _step(*given, delta_softplus)
    if goes_straight(given):
        return _triton(*given, delta_softplus)
    return torch.ops.ssm_modal.selective_scan_step(*given, delta_softplus)


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
    backend: str | None = None,
) -> Tensor:
    """As `selective_scan_step`, but writes the new state into `state` and returns `out` alone.

    Without autograd: raises RuntimeError where gradients are recorded and any argument requires them.
    """
    B, C = _check(u, delta, A, B, C, state, D, z, delta_bias, delta_softplus)
    given = (u, delta, A, B, C, state, D, z, delta_bias)
    check_no_gradient("selective_scan_step_", given)
    if resolve(OP, u.device, u.dtype, backend) == "torch":
        with without_autocast(u.device):
            out, new = _step(*given, delta_softplus)
        state.copy_(new)
        return out
    if goes_straight(given):
        written("selective_scan_step_", "state", state)
        return _triton_(*given, delta_softplus)
    return torch.ops.ssm_modal.selective_scan_step_(*given, delta_softplus)


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
    groups, d_state = B.shape[1:]
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt, threshold=20.0)
    B, C = B.to(wide), C.to(wide)
    dtx = (dt * x).view(batch, groups, d_inner // groups, 1)
    drive = (dtx * B.unsqueeze(2)).view(batch, d_inner, d_state)
    new = torch.addcmul(drive, torch.exp(dt.unsqueeze(-1) * A), state)
    y = (new.view(batch, groups, d_inner // groups, d_state) @ C.unsqueeze(-1)).reshape(batch, d_inner)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), new


def _triton(
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
    from ssm_modal.kernels.scan.triton_step import selective_scan_step_triton

    new = state.new_empty(state.shape)
    out = selective_scan_step_triton(u, delta, A, B, C, state, D, z, delta_bias, delta_softplus, new)
    return out, new


def _triton_(
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
) -> Tensor:
    from ssm_modal.kernels.scan.triton_step import selective_scan_step_triton

    return selective_scan_step_triton(u, delta, A, B, C, state, D, z, delta_bias, delta_softplus, state)


def _fake(
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
    return u.new_empty(u.shape), state.new_empty(state.shape)


def _fake_(
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
) -> Tensor:
    return u.new_empty(u.shape)


torch.library.impl("ssm_modal::selective_scan_step", "default")(_triton)
torch.library.impl("ssm_modal::selective_scan_step_", "default")(_triton_)
torch.library.register_fake("ssm_modal::selective_scan_step")(_fake)
torch.library.register_fake("ssm_modal::selective_scan_step_")(_fake_)


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
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Check every argument, unless the like of them passed; returns B and C as (batch, groups, d_state)."""
    check_flags(OP, delta_softplus=delta_softplus)
    seen = signature((u, delta, A, B, C, state, D, z, delta_bias))
    if seen in _passed:
        return B if B.ndim == 3 else B.unsqueeze(1), C if C.ndim == 3 else C.unsqueeze(1)
    B, C = _check_tensors(u, delta, A, B, C, state, D, z, delta_bias)
    _passed.add(seen)
    return B, C


def _check_tensors(
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
    check_shape(OP, "u", u, ("batch", "d_inner"), "(batch, d_inner)")
    check_dtype(OP, "u", u, FLOATING)
    batch, d_inner = u.shape
    check_shape(OP, "A", A, (d_inner, "d_state"), "(d_inner, d_state)")
    d_state = check_d_state(OP, A)
    check_shape(OP, "delta", delta, (batch, d_inner), "(batch, d_inner), the shape of u")
    if z is not None:
        check_shape(OP, "z", z, (batch, d_inner), "(batch, d_inner), the shape of u")
    B = _canonical("B", B, batch, d_inner, d_state)
    C = _canonical("C", C, batch, d_inner, d_state)
    if B.shape != C.shape:
        raise ValueError(f"{OP}: B has {B.shape[1]} groups and C {C.shape[1]}, expected the same number")
    check_same(OP, {"delta": delta, "B": B, "C": C, "z": z}, "u", u)
    check_shape(OP, "state", state, (batch, d_inner, d_state), "(batch, d_inner, d_state)")
    for name, p in (("D", D), ("delta_bias", delta_bias)):
        if p is not None:
            check_shape(OP, name, p, (d_inner,), "(d_inner,)")
    check_wide(OP, {"A": A, "D": D, "delta_bias": delta_bias, "state": state}, "u", u)
    return B, C


def _canonical(name: str, m: Tensor, batch: int, d_inner: int, d_state: int) -> Tensor:
    """B or C as (batch, groups, d_state)."""
    if not isinstance(m, Tensor) or m.ndim != 3:
        meaning = "(batch, d_state) or (batch, groups, d_state)"
        return check_shape(OP, name, m, (batch, d_state), meaning).unsqueeze(1)
    check_shape(OP, name, m, (batch, "groups", d_state), "(batch, groups, d_state)")
    if m.shape[1] == 0 or d_inner % m.shape[1]:
        raise ValueError(
            f"{OP}: {name} has {m.shape[1]} groups, expected a divisor of d_inner, which is {d_inner}"
        )
    return m

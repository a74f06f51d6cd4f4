"""Argument checks shared by `lti_scan` and its step."""

from __future__ import annotations

from torch import Tensor

from ssm_modal.kernels.checks import (
    check_d_state,
    check_device,
    check_dtype,
    check_same,
    check_shape,
    complex_dtype,
    state_dtype,
)


def check_system(
    op: str,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state_name: str,
    state: Tensor | None,
    rows: int,
    axis: str,
) -> None:
    """Check parameters and state beside an already checked u of (..., d_inner)."""
    d_inner = u.shape[-1]
    beside = f"with u in {str(u.dtype).removeprefix('torch.')}"
    check_shape(op, "A", A, (d_inner, "d_state"), "(d_inner, d_state)")
    d_state = check_d_state(op, A)
    for name, m in (("B", B), ("C", C)):
        check_shape(op, name, m, (d_inner, d_state), "(d_inner, d_state), the shape of A")
    check_shape(op, "dt", dt, (d_inner,), "(d_inner,)")
    if D is not None:
        check_shape(op, "D", D, (d_inner,), "(d_inner,)")
    if state is not None:
        check_shape(op, state_name, state, (rows, d_inner, d_state), f"({axis}, d_inner, d_state)")
    real, imaginary = state_dtype(u.dtype), complex_dtype(u.dtype)
    expected = (("dt", dt, real), ("D", D, real), ("A", A, imaginary), ("B", B, imaginary))
    for name, p, dtype in (*expected, ("C", C, imaginary), (state_name, state, imaginary)):
        if p is not None:
            check_device(op, name, p, u.device, "u")
            check_dtype(op, name, p, (dtype,), beside)


def check_gate(op: str, u: Tensor, z: Tensor | None) -> None:
    """Check that z is like u."""
    if z is not None:
        axes = "(batch, length, d_inner)" if u.ndim == 3 else "(batch, d_inner)"
        check_shape(op, "z", z, tuple(u.shape), f"{axes}, the shape of u")
        check_same(op, {"z": z}, "u", u)

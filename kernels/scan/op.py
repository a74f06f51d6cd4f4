"""`selective_scan`, the op everything rests on: checks its arguments, chooses a backend and calls it."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ssm_modal.kernels.checks import (
    FLOATING,
    Passed,
    check_d_state,
    check_dtype,
    check_flags,
    check_same,
    check_shape,
    check_wide,
    signature,
)
from ssm_modal.kernels.dispatch import resolve
from ssm_modal.kernels.scan.custom_op import scan
from ssm_modal.kernels.sequences import Sequences, check_packing

OP = "selective_scan"

_passed = Passed()


@overload
def selective_scan(
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
    return_final_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def selective_scan(
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
    return_final_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def selective_scan(
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
    return_final_state: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan S6 (Mamba, arXiv 2312.00752, algorithm 2, equations 2-4):

        dt_t = softplus(delta_t + delta_bias)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t  = <C_t, h_t> + D u_t,    out_t = y_t * silu(z_t)

    Args:
        u: (batch, length, d_inner), the input; fp32, bf16, fp16 or fp64. Any length from 0, any strides.
        delta: (batch, length, d_inner), dtype of u: the step size, before bias and softplus.
        A: (d_inner, d_state) real, fp32 (fp64 beside fp64 inputs); d_state 1 to 256.
        B: (batch, length, d_state) or (batch, length, groups, d_state), groups dividing d_inner; dtype of u.
        C: shape and dtype of B.
        D: (d_inner,), dtype of A: the skip connection.
        z: (batch, length, d_inner), dtype of u: the gate.
        delta_bias: (d_inner,), dtype of A: added to delta.
        delta_softplus: pass delta + delta_bias through softplus (threshold 20, as torch).
        initial_state: (batch, d_inner, d_state), or (sequences, d_inner, d_state) with `cu_seqlens`; dtype of
            A; None stands for zeros.
        cu_seqlens: borders of packed sequences, int32 or int64 (sequences + 1,), batch 1, or a checked
            `Sequences` (a tensor is read from its device once a call: that synchronises, and torch.compile
            cannot take it whole).
        reverse: h_t depends on h_{t+1}; the initial state enters at the last step, and the final state is the
            one after step 0, of each sequence.
        return_final_state: return (out, final_state) instead of out.
        backend: "triton", "cpu", "torch", or None to choose (see `ssm_modal.kernels.dispatch`).

    Returns:
        out: (batch, length, d_inner), dtype of u; with `return_final_state` also final_state, shaped as
        initial_state, dtype of A. First derivatives flow to every tensor argument, from both. Under autocast
        nothing is cast.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the backend asked for cannot serve this call.
    """
    check_flags(OP, delta_softplus=delta_softplus, reverse=reverse, return_final_state=return_final_state)
    seen = None if cu_seqlens is not None else signature((u, delta, A, B, C, D, z, delta_bias, initial_state))
    seqs: Sequences | None = None
    if seen not in _passed:
        seqs = check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
        _passed.add(seen)
    chosen = resolve(OP, u.device, u.dtype, backend)
    # Nothing to compute, or one step at most: kernels need not know of empty axes.
    if u.numel() == 0:
        chosen = "torch"
    out, final = scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seqs, reverse, chosen
    )
    return (out, final.contiguous()) if return_final_state else out


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | Sequences | None,
) -> Sequences | None:
    """Check every argument; returns the validated sequences."""
    check_shape(OP, "u", u, ("batch", "length", "d_inner"), "(batch, length, d_inner)")
    check_dtype(OP, "u", u, FLOATING)
    batch, length, d_inner = shape = u.shape

    check_shape(OP, "A", A, (d_inner, "d_state"), "(d_inner, d_state)")
    if A.is_complex():
        raise TypeError(f"{OP}: A is complex, expected a real diagonal; for complex states use lti_scan")
    d_state = check_d_state(OP, A)

    check_shape(OP, "delta", delta, shape, "(batch, length, d_inner), the shape of u")
    if z is not None:
        check_shape(OP, "z", z, shape, "(batch, length, d_inner), the shape of u")
    groups = _check_matrix("B", B, batch, length, d_inner, d_state)
    others = _check_matrix("C", C, batch, length, d_inner, d_state)
    if groups != others:
        raise ValueError(f"{OP}: B has {groups} groups and C has {others}, expected the same number")
    check_same(OP, {"delta": delta, "B": B, "C": C, "z": z}, "u", u)

    seqs, rows, axis = check_packing(OP, "u", u, cu_seqlens)
    if initial_state is not None:
        meaning = f"({axis}, d_inner, d_state)"
        check_shape(OP, "initial_state", initial_state, (rows, d_inner, d_state), meaning)
    if D is not None:
        check_shape(OP, "D", D, (d_inner,), "(d_inner,)")
    if delta_bias is not None:
        check_shape(OP, "delta_bias", delta_bias, (d_inner,), "(d_inner,)")
    wide = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    check_wide(OP, wide, "u", u)
    return seqs


def _check_matrix(name: str, m: Tensor, batch: int, length: int, d_inner: int, d_state: int) -> int:
    """The groups of B or C; raises unless it is (batch, length, [groups,] d_state)."""
    if not isinstance(m, Tensor) or m.ndim != 4:
        meaning = "(batch, length, d_state) or (batch, length, groups, d_state)"
        check_shape(OP, name, m, (batch, length, d_state), meaning)
        return 1
    check_shape(OP, name, m, (batch, length, "groups", d_state), "(batch, length, groups, d_state)")
    groups = m.shape[2]
    if groups == 0 or d_inner % groups:
        raise ValueError(
            f"{OP}: {name} has {groups} groups, expected a divisor of d_inner, which is {d_inner}"
        )
    return groups

"""`lti_scan`, the time-invariant diagonal scan with complex state (S4D): checks and calls."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ssm_modal.kernels.checks import FLOATING, check_dtype, check_flags, check_shape
from ssm_modal.kernels.dispatch import resolve
from ssm_modal.kernels.lti.arguments import check_gate, check_system
from ssm_modal.kernels.lti.chunked import lti_scan_chunked
from ssm_modal.kernels.sequences import Sequences, check_packing

OP = "lti_scan"


@overload
def lti_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | Sequences | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def lti_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | Sequences | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def lti_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | Sequences | None = ...,
    reverse: bool = ...,
    return_final_state: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def lti_scan(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The diagonal time-invariant scan of S4D (arXiv 2206.11893), discretised by zero-order hold:

        x_t = exp(dt A) x_{t-1} + (exp(dt A) - 1) / A * B u_t
        y_t = 2 Re(sum_n C_n x_{t,n}) + D u_t,    out_t = y_t * silu(z_t)

    Args:
        u: (batch, length, d_inner) real, fp32, bf16, fp16 or fp64. Any length from 0, any strides.
        dt: (d_inner,), fp32 (fp64 beside fp64 inputs): the step sizes.
        A: (d_inner, d_state) complex64 (complex128 beside fp64 inputs); d_state 1 to 256.
        B: shape and dtype of A.
        C: shape and dtype of A.
        D: (d_inner,), dtype of dt: the skip connection.
        z: (batch, length, d_inner), dtype of u: the gate.
        initial_state: (batch, d_inner, d_state), or (sequences, d_inner, d_state) with `cu_seqlens`; dtype of
            A; None stands for zeros.
        cu_seqlens, reverse, return_final_state: as in `selective_scan`.
        backend: "torch", the one form this op has, or None.

    Returns:
        out: (batch, length, d_inner), dtype of u; with `return_final_state` also the final state, shaped as
        initial_state, dtype of A. Gradients flow to every tensor argument, from both. A long convolution goes
        through FFTs: an infinite or NaN input spoils its whole chunk, earlier steps included.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the backend asked for cannot serve this call.
    """
    check_flags(OP, reverse=reverse, return_final_state=return_final_state)
    check_shape(OP, "u", u, ("batch", "length", "d_inner"), "(batch, length, d_inner)")
    check_dtype(OP, "u", u, FLOATING)
    seqs, rows, axis = check_packing(OP, "u", u, cu_seqlens)
    check_system(OP, u, dt, A, B, C, D, "initial_state", initial_state, rows, axis)
    check_gate(OP, u, z)
    resolve(OP, u.device, u.dtype, backend)
    out, final = lti_scan_chunked(u, dt, A, B, C, D, z, initial_state, seqs, reverse, return_final_state)
    if return_final_state:
        assert final is not None
        return out, final
    return out

"""The public `rms_norm`: checks its arguments, asks the dispatcher, and ties the Triton form to autograd."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import (
    FLOATING,
    Passed,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
    signature,
    state_dtype,
)
from ssm_modal.kernels.dispatch import resolve
from ssm_modal.kernels.norm.custom_op import norm
from ssm_modal.kernels.norm.ref import rms_norm_ref

_passed = Passed()


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    residual: None = ...,
    gate: Tensor | None = ...,
    eps: float = ...,
    norm_before_gate: bool = ...,
    residual_in_fp32: bool = ...,
    group_size: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    residual: Tensor,
    gate: Tensor | None = ...,
    eps: float = ...,
    norm_before_gate: bool = ...,
    residual_in_fp32: bool = ...,
    group_size: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    residual: Tensor | None,
    gate: Tensor | None = ...,
    eps: float = ...,
    norm_before_gate: bool = ...,
    residual_in_fp32: bool = ...,
    group_size: int | None = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    residual_in_fp32: bool = False,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467), with the residual add in front and the gate of Mamba-2 (arXiv 2405.21060).

        s = x + residual                            h = s, or s * silu(gate) unless norm_before_gate
        out = h / sqrt(mean(h^2) + eps) * weight    (* silu(gate) if norm_before_gate)

    Args:
        x: (..., dim), fp32, bf16, fp16 or fp64.
        weight: (dim,) in x's dtype, or fp32 beside bf16 and fp16; None for none.
        residual: x's shape, in x's dtype, or fp32 beside bf16 and fp16.
        gate: x's shape and dtype.
        eps: above 0.
        norm_before_gate: gate the norm instead of norming what is gated.
        residual_in_fp32: return the sum in fp32 even where `residual` is in half precision.
        group_size: channels a mean runs over, dividing dim; None for all of them.
        backend: None to choose, "triton" or "torch".

    Returns:
        out, x's shape and dtype. With `residual` also the sum s: fp32 if `residual_in_fp32` (fp64 stays
        fp64), else in `residual`'s dtype. What is normalised is s as returned, its rounding included.
        Gradients flow to every tensor, from both outputs, and have the arguments' dtypes.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device.
        BackendError: the backend asked for cannot serve the call.
    """
    op = "rms_norm"
    seen = signature((x, weight, residual, gate))
    if seen is not None:
        # What cannot be in a set is checked; True, which equals 1, is no eps that passed.
        plain = type(eps) is float and (group_size is None or type(group_size) is int)
        seen = (*seen, eps, group_size) if plain else None
    if seen not in _passed:
        check_arguments(op, x, weight, residual, gate, eps, group_size)
        _passed.add(seen)
    if resolve(op, x.device, x.dtype, backend) == "torch":
        if gate is None and group_size is None and x.dtype == state_dtype(x.dtype):
            # The same formula in one call: a short chunk of a stream has no more time than its calls take.
            stream = x if residual is None else x + residual
            normed = F.rms_norm(stream, (x.shape[-1],), weight, eps)
            return normed if residual is None else (normed, stream)
        return rms_norm_ref(
            x,
            weight,
            residual=residual,
            gate=gate,
            eps=eps,
            norm_before_gate=norm_before_gate,
            residual_in_fp32=residual_in_fp32,
            group_size=group_size,
        )
    out, total = norm(x, weight, residual, gate, eps, norm_before_gate, residual_in_fp32, group_size)
    return out if total is None else (out, total)


def check_arguments(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    group_size: int | None,
) -> None:
    """Raise TypeError or ValueError for arguments that `rms_norm` does not take."""
    check_tensor(op, "x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., dim) with dim at least 1")
    check_dtype(op, "x", x, FLOATING)
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number above 0")
    dim = x.shape[-1]
    if group_size is not None and not isinstance(group_size, int):
        raise TypeError(f"{op}: group_size must be a whole number or None, got {type(group_size).__name__}")
    if group_size is not None and (group_size < 1 or dim % group_size != 0):
        raise ValueError(f"{op}: group_size is {group_size}, expected a divisor of dim {dim}")
    half = (x.dtype,) if x.dtype == state_dtype(x.dtype) else (x.dtype, torch.float32)
    if weight is not None:
        check_shape(op, "weight", weight, (dim,), "(dim,)")
        check_device(op, "weight", weight, x.device, "x")
        check_dtype(op, "weight", weight, half, "the dtype of x, or fp32 beside bf16 and fp16")
    if residual is not None:
        check_shape(op, "residual", residual, tuple(x.shape), "the shape of x")
        check_device(op, "residual", residual, x.device, "x")
        check_dtype(op, "residual", residual, half, "the dtype of x, or fp32 beside bf16 and fp16")
    if gate is not None:
        check_shape(op, "gate", gate, tuple(x.shape), "the shape of x")
        check_device(op, "gate", gate, x.device, "x")
        check_dtype(op, "gate", gate, (x.dtype,), "the dtype of x")

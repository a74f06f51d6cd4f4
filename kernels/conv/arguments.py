"""What `causal_conv1d` and its step accept: shapes, dtypes and devices, checked in one place."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_modal.kernels.checks import FLOATING, Passed, check_device, check_dtype, check_shape, signature
from ssm_modal.kernels.sequences import Sequences, check_packing

ACTIVATIONS = (None, "silu")

_steps_passed = Passed()


def check_activation(op: str, activation: str | None) -> bool:
    """Whether SiLU is asked for; raises ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, expected None or 'silu'")
    return activation == "silu"


def check_sequence(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | Sequences | None,
) -> Sequences | None:
    """Check the tensors of the whole-sequence form; returns the validated sequences."""
    check_shape(op, "x", x, ("batch", "length", "d_inner"), "(batch, length, d_inner)")
    _check_parameters(op, x, weight, bias)
    seqs, rows, axis = check_packing(op, "x", x, cu_seqlens)
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, x, weight, rows, axis)
    return seqs


def check_step(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> bool:
    """Check the arguments of the single-step form; returns whether SiLU is asked for."""
    silu = check_activation(op, activation)
    seen = signature((x, weight, bias, state))
    if seen not in _steps_passed:
        check_shape(op, "x", x, ("batch", "d_inner"), "(batch, d_inner)")
        _check_parameters(op, x, weight, bias)
        _check_state(op, "state", state, x, weight, x.shape[0], "batch")
        _steps_passed.add(seen)
    return silu


def _check_parameters(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype(op, "x", x, FLOATING)
    d_inner = x.shape[-1]
    check_shape(op, "weight", weight, (d_inner, "d_conv"), "(d_inner, d_conv)")
    if weight.shape[1] < 1:
        raise ValueError(f"{op}: weight has d_conv 0, expected at least one tap")
    _check_parameter(op, "weight", weight, x)
    if bias is not None:
        check_shape(op, "bias", bias, (d_inner,), "(d_inner,)")
        _check_parameter(op, "bias", bias, x)


def _check_parameter(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """Parameters have x's dtype (a model cast whole) or fp32 beside half precision (master weights)."""
    allowed = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    check_device(op, name, value, x.device, "x")
    check_dtype(op, name, value, allowed, "the dtype of x, or fp32 beside bf16 and fp16")


def _check_state(op: str, name: str, state: Tensor, x: Tensor, weight: Tensor, rows: int, axis: str) -> None:
    shape = (rows, weight.shape[0], weight.shape[1] - 1)
    check_shape(op, name, state, shape, f"({axis}, d_inner, d_conv - 1)")
    check_device(op, name, state, x.device, "x")
    check_dtype(op, name, state, (x.dtype,), "the dtype of x: the state holds inputs")

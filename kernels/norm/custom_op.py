"""Custom ops that tie the Triton form of `rms_norm` to autograd and to torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.checks import recording
from ssm_modal.kernels.custom_ops import eager, register, without_none
from ssm_modal.kernels.norm.ref import residual_dtype

torch.library.define(
    "ssm_modal::rms_norm_fwd",
    "(Tensor x, Tensor? weight, Tensor? residual, Tensor? gate, float eps, bool norm_before_gate, "
    "bool residual_in_fp32, int? group_size) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ssm_modal::rms_norm_bwd",
    "(Tensor dout, Tensor? dtotal, Tensor s, Tensor? weight, Tensor? gate, Tensor rstd, "
    "bool norm_before_gate, ScalarType x_dtype, ScalarType? residual_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _fwd(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    group_size: int | None,
) -> tuple[Tensor, ...]:
    from ssm_modal.kernels.norm.triton_fwd import rms_norm_fwd

    made = rms_norm_fwd(x, weight, residual, gate, eps, norm_before_gate, residual_in_fp32, group_size)
    return without_none(made, x)


def _fwd_fake(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = 1 if group_size is None else x.shape[-1] // group_size
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(x.shape, dtype=residual_dtype(residual.dtype, residual_in_fp32))
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), total, x.new_empty(rows, groups, dtype=torch.float32)


def _bwd(
    dout: Tensor,
    dtotal: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    from ssm_modal.kernels.norm.triton_bwd import rms_norm_bwd

    grads = rms_norm_bwd(dout, dtotal, s, weight, gate, rstd, norm_before_gate, x_dtype, residual_dtype)
    return without_none(grads, dout)


def _bwd_fake(
    dout: Tensor,
    dtotal: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    return (
        s.new_empty(s.shape, dtype=x_dtype),
        dout.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        dout.new_empty(0) if residual_dtype is None else s.new_empty(s.shape, dtype=residual_dtype),
        dout.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, gate, _, norm_before_gate, _, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((rstd, total) if residual is None else (rstd,)))
    ctx.save_for_backward(x if residual is None else total, weight, gate, rstd)
    ctx.options = (norm_before_gate, x.dtype, None if residual is None else residual.dtype)


def _backward(
    ctx: Any, dout: Tensor | None, dtotal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None and dtotal is None:
        return (None,) * 8
    return _gradients(ctx, ctx.saved_tensors, dout, dtotal, torch.ops.ssm_modal.rms_norm_bwd)


def _gradients(
    ctx: Any,
    saved: tuple[Any, ...],
    dout: Tensor | None,
    dtotal: Tensor | None,
    bwd: Callable[..., Sequence[Tensor | None]],
) -> tuple[Tensor | None, ...]:
    """Gradients of the eight inputs of the forward, by `rms_norm_bwd` or its op.

    saved: `ctx.saved_tensors`, which gradient checkpointing lets a backward ask for once.
    """
    s, weight, gate, rstd = saved
    norm_before_gate, x_dtype, residual_dtype = ctx.options
    if dout is None:
        dout = s.new_zeros(s.shape, dtype=x_dtype)
    if residual_dtype is None:
        dtotal = None
    # Of one dtype, the gradients of x and residual are the same numbers: written once.
    apart = None if residual_dtype == x_dtype else residual_dtype
    dx, dweight, dresidual, dgate = bwd(dout, dtotal, s, weight, gate, rstd, norm_before_gate, x_dtype, apart)
    if residual_dtype == x_dtype:
        dresidual = dx
    return (
        dx,
        None if weight is None else dweight,
        None if residual_dtype is None else dresidual,
        None if gate is None else dgate,
        None,
        None,
        None,
        None,
    )


register(
    "rms_norm",
    forward=_fwd,
    forward_fake=_fwd_fake,
    backward=_bwd,
    backward_fake=_bwd_fake,
    setup_context=_setup_context,
    gradients=_backward,
    no_second="rms_norm has first derivatives only on backend 'triton': a second derivative was asked for "
    "(backward through a gradient taken with create_graph=True); use backend='torch' for that",
)


class _Norm(torch.autograd.Function):
    """The norm of an eager call that records gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        from ssm_modal.kernels.norm.triton_fwd import rms_norm_fwd

        x, weight, residual, gate, *options = inputs
        out, total, rstd = rms_norm_fwd(x, weight, residual, gate, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if total is None else total, weight, gate, rstd)
        ctx.options = (options[1], x.dtype, None if residual is None else residual.dtype)
        return out, total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        from ssm_modal.kernels.norm.triton_bwd import rms_norm_bwd

        dout, dtotal = upstream
        if dout is None and dtotal is None:
            return (None,) * 8
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled() and eager((dout, dtotal, *saved)):
            return _gradients(ctx, saved, dout, dtotal, rms_norm_bwd)
        # The op refuses a second derivative, and is what a trace of the backward can hold.
        return _gradients(ctx, saved, dout, dtotal, torch.ops.ssm_modal.rms_norm_bwd)


def norm(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    """(out, sum with the residual or None) by Triton on checked arguments, differentiable."""
    options = (eps, norm_before_gate, residual_in_fp32, group_size)
    given = (x, weight, residual, gate)
    if eager(given):
        if recording(given):
            return _Norm.apply(*given, *options)
        from ssm_modal.kernels.norm.triton_fwd import rms_norm_fwd

        return rms_norm_fwd(*given, *options)[:2]
    out, total, _ = torch.ops.ssm_modal.rms_norm_fwd(*given, *options)
    return out, None if residual is None else total

"""Custom ops that tie the Triton and compiled CPU forms of `causal_conv1d` to autograd and to torch.compile.

Packed sequences come as `cu_seqlens` beside their `lengths` on the host, so that the ops find their
`Sequences`, chunk tables included, in a cache and never read the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.checks import recording
from ssm_modal.kernels.custom_ops import eager, register, without_none
from ssm_modal.kernels.sequences import Sequences, cached_sequences, unpacked

torch.library.define(
    "ssm_modal::causal_conv1d_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, "
    "int[] lengths, bool reverse, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "ssm_modal::causal_conv1d_bwd",
    "(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? initial_state, Tensor? cu_seqlens, int[] lengths, bool reverse, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def backend_functions(backend: str) -> tuple[Any, Any]:
    """A backend's `causal_conv1d_fwd` and `causal_conv1d_bwd`, imported when first asked for."""
    if backend == "triton":
        from ssm_modal.kernels.conv import triton_bwd, triton_fwd

        return triton_fwd.causal_conv1d_fwd, triton_bwd.causal_conv1d_bwd
    from ssm_modal.kernels.cpu import bindings

    return bindings.causal_conv1d_fwd, bindings.causal_conv1d_bwd


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    seqs = cached_sequences(cu_seqlens, lengths)
    return backend_functions(backend)[0](x, weight, bias, silu, initial_state, seqs, reverse)


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else len(lengths)
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[0], weight.shape[1] - 1)


def _bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    seqs = cached_sequences(cu_seqlens, lengths)
    bwd = backend_functions(backend)[1]
    grads = bwd(dout, dfinal_state, x, weight, bias, silu, initial_state, seqs, reverse)
    return without_none(grads, x)


def _bwd_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, silu, initial_state, cu_seqlens, lengths, reverse, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.options = (silu, list(lengths), reverse, backend)


def _backward(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dfinal_state is None:
        return (None,) * 9
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    silu, lengths, reverse, backend = ctx.options
    if dout is None:
        dout = x.new_zeros(x.shape)
    options = (cu_seqlens, lengths, reverse, backend)
    *grads, dinitial = _grads_by_op(dout, dfinal_state, (x, weight, bias, initial_state), silu, options)
    return (*grads, None, dinitial, None, None, None, None)


def _grads_by_op(
    dout: Tensor,
    dfinal_state: Tensor | None,
    given: tuple[Tensor | None, ...],
    silu: bool,
    options: tuple[Any, ...],
) -> list[Tensor | None]:
    """Of each of the four tensors `given` the gradient by `causal_conv1d_bwd`, None where it is None."""
    *lead, initial_state = given
    grads = torch.ops.ssm_modal.causal_conv1d_bwd(dout, dfinal_state, *lead, silu, initial_state, *options)
    return [None if t is None else g for g, t in zip(grads, given)]


register(
    "causal_conv1d",
    forward=_fwd,
    forward_fake=_fwd_fake,
    backward=_bwd,
    backward_fake=_bwd_fake,
    setup_context=_setup_context,
    gradients=_backward,
    no_second="causal_conv1d has first derivatives only on backends 'triton' and 'cpu': a second derivative "
    "was asked for (backward through a gradient taken with create_graph=True); use backend='torch' for that",
)


class _Convolution(torch.autograd.Function):
    """The convolution of an eager call that records gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, silu, initial_state, seqs, reverse, backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.options = (silu, seqs, reverse, backend)
        return backend_functions(backend)[0](x, weight, bias, silu, initial_state, seqs, reverse)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        dout, dfinal_state = upstream
        if dout is None and dfinal_state is None:
            return (None,) * 8
        given = x, weight, bias, initial_state = ctx.saved_tensors
        silu, seqs, reverse, backend = ctx.options
        if dout is None:
            dout = x.new_zeros(x.shape)
        grads: Sequence[Tensor | None]
        if not torch.is_grad_enabled() and eager((dout, dfinal_state, *given)):
            bwd = backend_functions(backend)[1]
            grads = bwd(dout, dfinal_state, x, weight, bias, silu, initial_state, seqs, reverse)
        else:
            # The op refuses a second derivative, and is what a trace of the backward can hold.
            grads = _grads_by_op(dout, dfinal_state, given, silu, (*unpacked(seqs), reverse, backend))
        return (*grads[:3], None, grads[3], None, None, None)


class _ConvolutionBeside(torch.autograd.Function):
    """The convolution of the first channels of `wide` by Triton; the others pass. Their gradients are written
    side by side, where autograd would join two tensors and so write both twice."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        wide, weight, bias, silu, initial_state, seqs, reverse = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(wide, weight, bias, initial_state)
        ctx.options = (silu, seqs, reverse)
        own, rest = wide[..., : weight.shape[0]], wide[..., weight.shape[0] :]
        fwd = backend_functions("triton")[0]
        return (*fwd(own, weight, bias, silu, initial_state, seqs, reverse), rest)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        dout, dfinal_state, drest = upstream
        if dout is None and dfinal_state is None and drest is None:
            return (None,) * 7
        wide, weight, bias, initial_state = ctx.saved_tensors
        silu, seqs, reverse = ctx.options
        d_inner = weight.shape[0]
        x = wide[..., :d_inner]
        if dout is None:
            dout = x.new_zeros(x.shape)
        if drest is None:
            drest = wide.new_zeros(wide[..., d_inner:].shape)
        given = (x, weight, bias, initial_state)
        if torch.is_grad_enabled() or not eager((dout, dfinal_state, drest, *given)):
            # The op refuses a second derivative, and is what a trace of the backward can hold.
            options = (*unpacked(seqs), reverse, "triton")
            dx, dweight, dbias, dinitial = _grads_by_op(dout, dfinal_state, given, silu, options)
            assert dx is not None
            return torch.cat([dx, drest], -1), dweight, dbias, None, dinitial, None, None
        dwide = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
        dwide[..., d_inner:] = drest
        bwd = backend_functions("triton")[1]
        _, dweight, dbias, dinitial = bwd(
            dout, dfinal_state, *given[:3], silu, initial_state, seqs, reverse, dx=dwide[..., :d_inner]
        )
        return dwide, dweight, dbias, None, dinitial, None, None


def convolve_beside(
    wide: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final state) as of `convolve` on the first d_inner channels of `wide`, and the other channels."""
    given = (wide, weight, bias, initial_state)
    if backend == "triton" and eager(given) and recording(given):
        return _ConvolutionBeside.apply(wide, weight, bias, silu, initial_state, seqs, reverse)
    own, rest = wide.split([weight.shape[0], wide.shape[-1] - weight.shape[0]], dim=-1)
    return (*convolve(own, weight, bias, silu, initial_state, seqs, reverse, backend), rest)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, final state) by `backend` on checked arguments, differentiable."""
    given = (x, weight, bias, initial_state)
    if eager(given):
        if recording(given):
            return _Convolution.apply(x, weight, bias, silu, initial_state, seqs, reverse, backend)
        return backend_functions(backend)[0](x, weight, bias, silu, initial_state, seqs, reverse)
    return torch.ops.ssm_modal.causal_conv1d_fwd(
        x, weight, bias, silu, initial_state, *unpacked(seqs), reverse, backend
    )

"""Custom ops that tie the Triton and compiled CPU forms of `causal_conv1d` to autograd and to torch.compile.

Packed sequences come as `cu_seqlens` beside their `lengths` on the host, so that the ops find their
`Sequences`, chunk tables included, in a cache and never read the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.custom_ops import goes_straight, register, without_none
from ssm_modal.kernels.sequences import Sequences, cached_sequences

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
    if goes_straight((x, weight, bias, initial_state)):
        return backend_functions(backend)[0](x, weight, bias, silu, initial_state, seqs, reverse)
    cu_seqlens, lengths = (None, []) if seqs is None else (seqs.cu_seqlens, list(seqs.lengths))
    return torch.ops.ssm_modal.causal_conv1d_fwd(
        x, weight, bias, silu, initial_state, cu_seqlens, lengths, reverse, backend
    )


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
    dx, dweight, dbias, dinitial = torch.ops.ssm_modal.causal_conv1d_bwd(
        dout, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, lengths, reverse, backend
    )
    dbias = None if bias is None else dbias
    dinitial = None if initial_state is None else dinitial
    return dx, dweight, dbias, None, dinitial, None, None, None, None


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

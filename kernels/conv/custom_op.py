"""Custom ops that tie the Triton and compiled CPU forms of `causal_conv1d` to autograd and to torch.compile.

Packed sequences come as `cu_seqlens` beside their `lengths` on the host, so that the ops find their
`Sequences`, chunk tables included, in a cache and never read the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

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

_PLAIN = (Tensor, torch.nn.Parameter)


def backend_functions(backend: str) -> tuple[Any, Any]:
    """`causal_conv1d_fwd` and `causal_conv1d_bwd` of backend "triton" or "cpu", imported when first asked
    for.
    """
    if backend == "triton":
        from ssm_modal.kernels.conv import triton_conv

        return triton_conv.causal_conv1d_fwd, triton_conv.causal_conv1d_bwd
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
    """(out, final state) by `backend` on checked arguments, differentiable.

    Where no gradient is recorded, an eager call goes straight to the backend: the dispatcher and autograd's
    bookkeeping cost more than a short convolution.
    """
    if not torch.compiler.is_compiling():
        given = (x, weight, bias, initial_state)
        plain = all(t is None or type(t) in _PLAIN for t in given) and _get_current_dispatch_mode() is None
        if plain and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)):
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seqs = cached_sequences(cu_seqlens, lengths)
    dx, dweight, dbias, dinitial = backend_functions(backend)[1](
        dout, dfinal_state, x, weight, bias, silu, initial_state, seqs, reverse
    )
    # A custom op returns tensors only: an empty one stands for None.
    absent = x.new_empty(0)
    return (
        dx,
        dweight,
        absent if dbias is None else dbias,
        absent.clone() if dinitial is None else dinitial,
    )


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


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "causal_conv1d has first derivatives only on backends 'triton' and 'cpu': a second derivative was "
        "asked for (backward through a gradient taken with create_graph=True); use backend='torch' for that"
    )


torch.library.impl("ssm_modal::causal_conv1d_fwd", "default")(_fwd)
torch.library.impl("ssm_modal::causal_conv1d_bwd", "default")(_bwd)
torch.library.register_fake("ssm_modal::causal_conv1d_fwd")(_fwd_fake)
torch.library.register_fake("ssm_modal::causal_conv1d_bwd")(_bwd_fake)
torch.library.register_autograd("ssm_modal::causal_conv1d_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("ssm_modal::causal_conv1d_bwd", _no_double_backward)

"""Custom ops that tie the backends of the selective scan to autograd and to torch.compile.

`ssm_modal::selective_scan_fwd` and `ssm_modal::selective_scan_bwd` take checked arguments. Packed sequences
come as `cu_seqlens` beside their `lengths` on the host, so that the ops find their `Sequences`, chunk tables
included, in a cache and never read the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.checks import recording, state_dtype
from ssm_modal.kernels.custom_ops import eager, register, without_none
from ssm_modal.kernels.scan import chunked
from ssm_modal.kernels.sequences import Sequences, cached_sequences, unpacked

torch.library.define(
    "ssm_modal::selective_scan_fwd",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens, int[] lengths, bool reverse, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ssm_modal::selective_scan_bwd",
    "(Tensor dout, Tensor? dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens, "
    "int[] lengths, bool reverse, Tensor boundaries, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def backend_functions(backend: str) -> tuple[Any, Any]:
    """A backend's `selective_scan_fwd` and `selective_scan_bwd`, imported when first asked for."""
    if backend == "triton":
        from ssm_modal.kernels.scan import triton_bwd, triton_fwd

        return triton_fwd.selective_scan_fwd, triton_bwd.selective_scan_bwd
    if backend == "cpu":
        from ssm_modal.kernels.cpu import bindings

        return bindings.selective_scan_fwd, bindings.selective_scan_bwd
    return chunked.selective_scan_fwd, chunked.selective_scan_bwd


def boundaries_shape(
    backend: str, u: Tensor, A: Tensor, B: Tensor, seqs: Sequences | None
) -> tuple[int, ...]:
    """Shape of what a backend's forward keeps for its backward."""
    batch, length, d_inner = u.shape
    d_state, groups = A.shape[1], B.shape[2]
    if backend == "cpu":
        from ssm_modal.kernels.cpu import bindings

        return bindings.boundaries_shape(batch, length, d_inner, d_state, seqs)
    lengths = None if seqs is None else seqs.lengths
    if backend == "triton":
        from ssm_modal.kernels.scan.launch import boundaries_shape as of_triton

        return of_triton(batch, length, d_inner, d_state, groups, lengths)
    return chunked.boundaries_shape(batch, length, d_inner, d_state, groups, lengths)


def _fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    seqs = cached_sequences(cu_seqlens, lengths)
    fwd = backend_functions(backend)[0]
    out, final, states = fwd(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seqs, reverse
    )
    return out, final.contiguous(), states


def _fwd_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = state_dtype(u.dtype)
    # Only the lengths count here; the borders may be a tensor without data.
    seqs = None if cu_seqlens is None else Sequences(tuple(lengths), cu_seqlens)
    rows = u.shape[0] if seqs is None else seqs.n
    shape = boundaries_shape(backend, u, A, B, seqs)
    return (
        u.new_empty(u.shape),
        u.new_empty((rows, *A.shape), dtype=wide),
        u.new_empty(shape, dtype=wide),
    )


def _bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    boundaries: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    seqs = cached_sequences(cu_seqlens, lengths)
    bwd = backend_functions(backend)[1]
    grads = bwd(
        dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seqs, reverse,
        boundaries,
    )  # fmt: skip
    return without_none(grads, u)


def _bwd_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    reverse: bool,
    boundaries: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, cu_seqlens, lengths, reverse, backend = (
        inputs
    )
    boundaries = output[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(boundaries)
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, boundaries)
    ctx.options = (softplus, list(lengths), reverse, backend)


def _backward(
    ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None and dfinal_state is None:
        return (None,) * 14
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, boundaries = ctx.saved_tensors
    softplus, lengths, reverse, backend = ctx.options
    if dout is None:
        dout = torch.zeros_like(u, memory_format=torch.contiguous_format)
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    options = (cu_seqlens, lengths, reverse, boundaries, backend)
    *grads, dinitial = _grads_by_op(dout, dfinal_state, given, softplus, options)
    return (*grads, None, dinitial, None, None, None, None)


def _grads_by_op(
    dout: Tensor,
    dfinal_state: Tensor | None,
    given: tuple[Tensor | None, ...],
    softplus: bool,
    options: tuple[Any, ...],
) -> list[Tensor | None]:
    """Of each of the nine tensors `given` the gradient by `selective_scan_bwd`, None where it is None."""
    *lead, initial_state = given
    grads = torch.ops.ssm_modal.selective_scan_bwd(
        dout, dfinal_state, *lead, softplus, initial_state, *options
    )
    return [None if t is None else g for g, t in zip(grads, given)]


register(
    "selective_scan",
    forward=_fwd,
    forward_fake=_fwd_fake,
    backward=_bwd,
    backward_fake=_bwd_fake,
    setup_context=_setup_context,
    gradients=_backward,
    no_second="selective_scan has first derivatives only, but a second was asked for (backward through a "
    "gradient taken with create_graph=True); use selective_scan_ref for that",
)


class _Scan(torch.autograd.Function):
    """The scan of an eager call that records gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, seqs, reverse, backend = inputs
        # Here autograd does not follow: fewer nodes for it.
        lead = (u, delta, A, grouped(B), grouped(C), D, z, delta_bias)
        out, final, boundaries = backend_functions(backend)[0](*lead, softplus, initial_state, seqs, reverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, boundaries)
        ctx.options = (softplus, seqs, reverse, backend)
        # Not a view, which could not be written in place.
        return out, final.contiguous()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        dout, dfinal_state = upstream
        if dout is None and dfinal_state is None:
            return (None,) * 13
        u, delta, A, B, C, D, z, delta_bias, initial_state, boundaries = ctx.saved_tensors
        lead = (u, delta, A, grouped(B), grouped(C), D, z, delta_bias)
        softplus, seqs, reverse, backend = ctx.options
        if dout is None:
            dout = torch.zeros_like(u, memory_format=torch.contiguous_format)
        grads: Sequence[Tensor | None]
        if not torch.is_grad_enabled() and eager((dout, dfinal_state, *lead, initial_state)):
            bwd = backend_functions(backend)[1]
            grads = bwd(dout, dfinal_state, *lead, softplus, initial_state, seqs, reverse, boundaries)
        else:
            # The op refuses a second derivative, and is what a trace of the backward can hold.
            options = (*unpacked(seqs), reverse, boundaries, backend)
            grads = _grads_by_op(dout, dfinal_state, (*lead, initial_state), softplus, options)
        du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
        assert dB is not None
        assert dC is not None
        dB, dC = dB.view(B.shape), dC.view(C.shape)
        return du, ddelta, dA, dB, dC, dD, dz, dbias, None, dinitial, None, None, None


def grouped(m: Tensor) -> Tensor:
    """B or C as (batch, length, groups, d_state)."""
    return m if m.ndim == 4 else m.unsqueeze(2)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, final_state) by `backend` on checked arguments, differentiable; final_state of any strides.

    B, C: (batch, length, d_state) or (batch, length, groups, d_state).
    """
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    straight = eager(given)
    if straight and recording(given):
        return _Scan.apply(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seqs, reverse, backend
        )
    lead = (u, delta, A, grouped(B), grouped(C), D, z, delta_bias)
    if straight:
        fwd = backend_functions(backend)[0]
        # No backward will come: the compiled form need not write the states it would start from.
        none = {"save_boundaries": False} if backend == "cpu" else {}
        out, final, _ = fwd(*lead, delta_softplus, initial_state, seqs, reverse, **none)
        return out, final
    out, final, _ = torch.ops.ssm_modal.selective_scan_fwd(
        *lead, delta_softplus, initial_state, *unpacked(seqs), reverse, backend
    )
    return out, final

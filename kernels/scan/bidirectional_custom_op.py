"""Custom ops that tie the Triton bidirectional scan to autograd and to torch.compile.

`ssm_modal::bidirectional_scan_fwd` and `ssm_modal::bidirectional_scan_bwd` take checked arguments; see
`custom_op.py` for packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.checks import recording, state_dtype
from ssm_modal.kernels.custom_ops import eager, register, without_none
from ssm_modal.kernels.scan.custom_op import boundaries_shape
from ssm_modal.kernels.scan.direction import ScanDirection
from ssm_modal.kernels.sequences import Sequences, cached_sequences, unpacked

_DIRECTIONS = ", ".join(
    f"Tensor delta{x}, Tensor A{x}, Tensor B{x}, Tensor C{x}, Tensor? D{x}, Tensor? bias{x}"
    for x in ("", "_back")
)
_REST = "Tensor? z, bool delta_softplus, Tensor? cu_seqlens, int[] lengths"
torch.library.define(
    "ssm_modal::bidirectional_scan_fwd",
    f"(Tensor u, Tensor? u_back, {_DIRECTIONS}, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ssm_modal::bidirectional_scan_bwd",
    f"(Tensor dout, Tensor u, Tensor? u_back, {_DIRECTIONS}, {_REST}, Tensor? y, Tensor states, "
    f"Tensor states_back) -> ({', '.join(['Tensor'] * 15)})",
)
# Tensors among the arguments of the forward that have gradients: u, u_back, six of each direction and z.
TENSORS = 15


def _fwd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_fwd

    softplus, cu_seqlens, lengths = inputs[TENSORS:]
    seqs = cached_sequences(cu_seqlens, lengths)
    out, y, states, states_back = bidirectional_scan_fwd(*_grouped(inputs), softplus, seqs, True)
    return out, out.new_empty(0) if y is None else y, states, states_back


def _fwd_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, _, ahead, _, z = _grouped(inputs)
    _, cu_seqlens, lengths = inputs[TENSORS:]
    # Only the lengths count here; the borders may be a tensor without data.
    seqs = None if cu_seqlens is None else Sequences(tuple(lengths), cu_seqlens)
    shape = boundaries_shape("triton", u, ahead.A, ahead.B, seqs)
    wide = state_dtype(u.dtype)
    return (
        u.new_empty(u.shape),
        u.new_empty(0 if z is None else u.shape),
        u.new_empty(shape, dtype=wide),
        u.new_empty(shape, dtype=wide),
    )


def _bwd(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_bwd

    softplus, cu_seqlens, lengths, *kept = inputs[TENSORS:]
    seqs = cached_sequences(cu_seqlens, lengths)
    du, du_back, ahead, back, dz = bidirectional_scan_bwd(dout, *_grouped(inputs), softplus, seqs, *kept)
    return without_none((du, du_back, *ahead, *back, dz), dout)


def _bwd_fake(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:TENSORS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    softplus, cu_seqlens, lengths = inputs[TENSORS:]
    _, y, states, states_back = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(y, states, states_back)
    ctx.save_for_backward(*inputs[:TENSORS], cu_seqlens, y, states, states_back)
    ctx.options = (softplus, list(lengths))


def _gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * (TENSORS + 3)
    *given, cu_seqlens, y, states, states_back = ctx.saved_tensors
    softplus, lengths = ctx.options
    kept = (None if given[-1] is None else y, states, states_back)
    return (*_grads_by_op(dout, given, softplus, (cu_seqlens, lengths), kept), None, None, None)


def _grads_by_op(
    dout: Tensor,
    given: Sequence[Tensor | None],
    softplus: bool,
    packed: tuple[Tensor | None, list[int]],
    kept: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Of each of the `TENSORS` tensors `given` the gradient by the custom op, None where it is None."""
    grads = torch.ops.ssm_modal.bidirectional_scan_bwd(dout, *given, softplus, *packed, *kept)
    return [None if t is None else g for g, t in zip(grads, given)]


register(
    "bidirectional_scan",
    forward=_fwd,
    forward_fake=_fwd_fake,
    backward=_bwd,
    backward_fake=_bwd_fake,
    setup_context=_setup_context,
    gradients=_gradients,
    no_second="bidirectional_scan has first derivatives only, but a second was asked for (backward through a "
    "gradient taken with create_graph=True); use two selective_scan_ref for that",
)


class _Both(torch.autograd.Function):
    """Both scans of an eager call that records gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_fwd

        *given, softplus, seqs = inputs
        out, *kept = bidirectional_scan_fwd(*_grouped(given), softplus, seqs, True)
        ctx.save_for_backward(*given, *kept)
        ctx.options = (softplus, seqs)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_bwd

        (dout,) = upstream
        *given, y, states, states_back = ctx.saved_tensors
        softplus, seqs = ctx.options
        kept = (y, states, states_back)
        if not torch.is_grad_enabled() and eager((dout, *given)):
            du, du_back, ahead, back, dz = bidirectional_scan_bwd(
                dout, *_grouped(given), softplus, seqs, *kept
            )
            return du, du_back, *ahead, *back, dz, None, None
        # The op refuses a second derivative, and is what a trace of the backward can hold.
        return (*_grads_by_op(dout, given, softplus, unpacked(seqs), kept), None, None)


def _grouped(
    given: Sequence[Any],
) -> tuple[Tensor, Tensor | None, ScanDirection, ScanDirection, Tensor | None]:
    """u, u_back, both directions and z of the `TENSORS` tensors of a call."""
    return given[0], given[1], ScanDirection(*given[2:8]), ScanDirection(*given[8:14]), given[14]


def scan_both(
    u: Tensor,
    u_back: Tensor | None,
    ahead: ScanDirection,
    back: ScanDirection,
    z: Tensor | None,
    delta_softplus: bool,
    seqs: Sequences | None,
) -> Tensor:
    """`bidirectional_scan` by Triton on checked arguments, differentiable."""
    given = (u, u_back, *ahead.parts(), *back.parts(), z)
    if eager(given):
        if recording(given):
            return _Both.apply(*given, delta_softplus, seqs)
        from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_fwd

        return bidirectional_scan_fwd(u, u_back, ahead, back, z, delta_softplus, seqs, False)[0]
    return torch.ops.ssm_modal.bidirectional_scan_fwd(*given, delta_softplus, *unpacked(seqs))[0]

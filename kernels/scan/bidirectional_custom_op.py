"""Custom ops that tie the Triton bidirectional scan to autograd and to torch.compile.

`ssm_modal::bidirectional_scan_fwd` and `ssm_modal::bidirectional_scan_bwd` take checked arguments; see
`custom_op.py` for packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.custom_ops import goes_straight, register, without_none
from ssm_modal.kernels.scan.custom_op import boundaries_shape
from ssm_modal.kernels.scan.direction import ScanDirection
from ssm_modal.kernels.sequences import Sequences, cached_sequences

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


def _fwd(
    u: Tensor,
    u_back: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_fwd

    z, softplus, cu_seqlens, lengths = rest[12:]
    seqs = cached_sequences(cu_seqlens, lengths)
    out, y, states, states_back = bidirectional_scan_fwd(
        u, u_back, ScanDirection(*rest[:6]), ScanDirection(*rest[6:12]), z, softplus, seqs, True
    )
    return out, u.new_empty(0) if y is None else y, states, states_back


def _fwd_fake(u: Tensor, u_back: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B = rest[1], rest[2]
    z, _, cu_seqlens, lengths = rest[12:]
    # Only the lengths count here; the borders may be a tensor without data.
    seqs = None if cu_seqlens is None else Sequences(tuple(lengths), cu_seqlens)
    shape = boundaries_shape("triton", u, A, B, seqs)
    wide = state_dtype(u.dtype)
    return (
        u.new_empty(u.shape),
        u.new_empty(0 if z is None else u.shape),
        u.new_empty(shape, dtype=wide),
        u.new_empty(shape, dtype=wide),
    )


def _bwd(dout: Tensor, u: Tensor, u_back: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_bwd

    z, softplus, cu_seqlens, lengths, y, states, states_back = rest[12:]
    seqs = cached_sequences(cu_seqlens, lengths)
    du, du_back, ahead, back, dz = bidirectional_scan_bwd(
        dout, u, u_back, ScanDirection(*rest[:6]), ScanDirection(*rest[6:12]), z, softplus, seqs, y, states,
        states_back,
    )  # fmt: skip
    return without_none((du, du_back, *ahead, *back, dz), u)


def _bwd_fake(dout: Tensor, u: Tensor, u_back: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, u_back, *rest[: TENSORS - 2])
    )


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
    grads = torch.ops.ssm_modal.bidirectional_scan_bwd(
        dout, *given, softplus, cu_seqlens, lengths, y if given[-1] is not None else None, states, states_back
    )
    return (*(g if t is not None else None for g, t in zip(grads, given)), None, None, None)


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
    if goes_straight((u, u_back, *ahead.parts(), *back.parts(), z)):
        from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_fwd

        return bidirectional_scan_fwd(u, u_back, ahead, back, z, delta_softplus, seqs, False)[0]
    cu_seqlens, lengths = (None, []) if seqs is None else (seqs.cu_seqlens, list(seqs.lengths))
    return torch.ops.ssm_modal.bidirectional_scan_fwd(
        u, u_back, *ahead.parts(), *back.parts(), z, delta_softplus, cu_seqlens, lengths
    )[0]

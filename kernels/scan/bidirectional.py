"""`bidirectional_scan`: one scan each way, which share what they read and write one output."""

from __future__ import annotations

from torch import Tensor

from ssm_modal.kernels.checks import check_flags, check_same, check_shape
from ssm_modal.kernels.dispatch import resolve
from ssm_modal.kernels.scan.bidirectional_custom_op import scan_both
from ssm_modal.kernels.scan.custom_op import grouped, scan
from ssm_modal.kernels.scan.direction import ScanDirection
from ssm_modal.kernels.scan.op import check_scan
from ssm_modal.kernels.sequences import Sequences

OP = "bidirectional_scan"


def bidirectional_scan(
    u: Tensor,
    forwards: ScanDirection,
    backwards: ScanDirection,
    *,
    u_backwards: Tensor | None = None,
    z: Tensor | None = None,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sum of two selective scans, of `forwards` in time's order and of `backwards` in reverse:

        selective_scan(u, forwards, z) + selective_scan(u, backwards, z, reverse=True)

    with each direction's own delta, A, B, C, D and delta_bias. Triton reads u, z and the output's gradient
    for both, gates once, and writes one output and one gradient of u and z; other backends add up two scans.

    Args:
        u: (batch, length, d_inner), the input; fp32, bf16, fp16 or fp64.
        forwards, backwards: what belongs to each direction.
        u_backwards: shape and dtype of u: what `backwards` scans (each direction may have a convolution of
            its own); None for u.
        z: (batch, length, d_inner), dtype of u: the gate of the sum.
        delta_softplus: pass delta + delta_bias through softplus, in both directions.
        cu_seqlens: borders of packed sequences, see `selective_scan`.
        backend: "triton", "cpu", "torch", or None to choose.

    Returns:
        (batch, length, d_inner), dtype of u. First derivatives flow to every tensor argument.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the backend asked for cannot serve this call.
    """
    check_flags(OP, delta_softplus=delta_softplus)
    for name, direction in (("forwards", forwards), ("backwards", backwards)):
        if not isinstance(direction, ScanDirection):
            raise TypeError(f"{OP}: {name} must be a ScanDirection, got {type(direction).__name__}")
    if u_backwards is not None:
        check_shape(OP, "u_backwards", u_backwards, tuple(u.shape), "(batch, length, d_inner), as u")
        check_same(OP, {"u_backwards": u_backwards}, "u", u)
    ahead, seqs = _checked("forwards", u, forwards, z, cu_seqlens)
    back, _ = _checked("backwards", u, backwards, z, seqs)
    if ahead.A.shape != back.A.shape or ahead.B.shape != back.B.shape:
        raise ValueError(
            f"{OP}: forwards has A {tuple(ahead.A.shape)} and B {tuple(ahead.B.shape)}, backwards has A "
            f"{tuple(back.A.shape)} and B {tuple(back.B.shape)}, expected d_state and groups to be the same"
        )
    chosen = resolve("selective_scan", u.device, u.dtype, backend)
    if u.numel() == 0:
        chosen = "torch"
    if chosen == "triton":
        return scan_both(u, u_backwards, ahead, back, z, delta_softplus, seqs)
    given = ((u, ahead, False), (u if u_backwards is None else u_backwards, back, True))
    first, second = (
        scan(x, p.delta, p.A, p.B, p.C, p.D, z, p.delta_bias, delta_softplus, None, seqs, reverse, chosen)[0]
        for x, p, reverse in given
    )
    return first + second


def _checked(
    name: str, u: Tensor, x: ScanDirection, z: Tensor | None, cu_seqlens: Tensor | Sequences | None
) -> tuple[ScanDirection, Sequences | None]:
    """The direction with B and C as (batch, length, groups, d_state), and the sequences."""
    try:
        seqs = check_scan(u, x.delta, x.A, x.B, x.C, x.D, z, x.delta_bias, None, cu_seqlens)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{OP}: {name}: {error}") from error
    return ScanDirection(x.delta, x.A, grouped(x.B), grouped(x.C), x.D, x.delta_bias), seqs

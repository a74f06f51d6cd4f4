"""Triton bidirectional scan: two scans in opposite directions, the second of which goes on with the first's.

    out = (y + y') * silu(z), y of a scan in time's order, y' of one in reverse

Forward: the first scan writes its y, without a gate; the second adds its own to it, gates the sum, writes the
output and, where gradients are wanted, the sum. The skip connections of one u are one, (D + D') u.

Backward: the gate's part is done once. The first scan's `chunk_grad_kernel`, which reads dout and z anyway,
reads that sum too and leaves dz and dy = dout * silu(z), in the dtype of u. The gradients of either scan are
then those of one without a gate, whose y need not be computed again, and the second scan adds its du to that
of the first. So nothing is added up in a pass of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.scan import triton_bwd, triton_fwd
from ssm_modal.kernels.scan.direction import ScanDirection
from ssm_modal.kernels.scan.launch import ScanLaunch
from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd
from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd
from ssm_modal.kernels.sequences import Sequences


def bidirectional_scan_fwd(
    u: Tensor,
    u_back: Tensor | None,
    ahead: ScanDirection,
    back: ScanDirection,
    z: Tensor | None,
    delta_softplus: bool,
    seqs: Sequences | None,
    keep: bool,
    *,
    launch: ScanLaunch | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The sum of both scans of validated arguments, gated by z.

    u_back: what `back` scans, None for u. Returns out, shape and dtype of u, and what
    `bidirectional_scan_bwd` needs: the sum before the gate (None unless `keep` and z) and the states entering
    the chunks of either direction.
    """
    delta, A, B, C, D, bias = ahead.parts()
    delta_back, A_back, B_back, C_back, D_back, bias_back = back.parts()
    if u_back is None:
        D, D_back, u_back = _joint(D, D_back), None, u
    y, _, states = selective_scan_fwd(
        u, delta, A, B, C, D, None, bias, delta_softplus, None, seqs, False, launch=launch
    )
    keep = keep and z is not None
    out, _, states_back = selective_scan_fwd(
        u_back, delta_back, A_back, B_back, C_back, D_back, z, bias_back, delta_softplus, None, seqs, True,
        launch=launch, added=y, keep=keep,
    )  # fmt: skip
    return out, y if keep else None, states, states_back


def bidirectional_scan_bwd(
    dout: Tensor,
    u: Tensor,
    u_back: Tensor | None,
    ahead: ScanDirection,
    back: ScanDirection,
    z: Tensor | None,
    delta_softplus: bool,
    seqs: Sequences | None,
    y: Tensor | None,
    states: Tensor,
    states_back: Tensor,
    *,
    launch: ScanLaunch | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...], Tensor | None]:
    """Gradients of `bidirectional_scan_fwd` with `keep`: to u, u_back, ahead, back and z, None for None.

    y, states, states_back: what the forward returned.
    """
    delta, A, B, C, D, bias = ahead.parts()
    delta_back, A_back, B_back, C_back, D_back, bias_back = back.parts()
    one = u_back is None
    skip, skip_back = (_joint(D, D_back), None) if one else (D, D_back)
    dy = None if y is None else torch.empty_like(y)
    du, ddelta, dA, dB, dC, dskip, dz, dbias, _ = selective_scan_bwd(
        dout, None, u, delta, A, B, C, skip, z, bias, delta_softplus, None, seqs, False, states,
        launch=launch, y=y, dy=dy,
    )  # fmt: skip
    du_back, ddelta_back, dA_back, dB_back, dC_back, dskip_back, _, dbias_back, _ = selective_scan_bwd(
        dout if dy is None else dy, None, u if u_back is None else u_back, delta_back, A_back, B_back, C_back,
        skip_back, None, bias_back, delta_softplus, None, seqs, True, states_back,
        launch=launch, added=du if one else None,
    )  # fmt: skip
    if one:
        # Both skip connections have the same gradient; a custom op must not return a tensor twice.
        dskip_back = None if D_back is None or dskip is None else dskip.clone()
        dskip = None if D is None else dskip
    return (
        du,
        None if one else du_back,
        (ddelta, dA, dB, dC, dskip, dbias),
        (ddelta_back, dA_back, dB_back, dC_back, dskip_back, dbias_back),
        dz,
    )


def _joint(D: Tensor | None, D_back: Tensor | None) -> Tensor | None:
    """The skip connection of both directions."""
    if D is None or D_back is None:
        return D if D_back is None else D_back
    return D + D_back


def aot_cases() -> list[AotCase]:
    """The kernels of either direction where they differ from those of one scan, at every row of the table."""
    cases = []
    for case in triton_fwd.aot_cases(added=True):
        given = case.args["u_ptr"]
        if case.name == "output_kernel":
            cases.append((case, {"added_ptr": given, "y_ptr": given}))
    for case in triton_bwd.aot_cases(gated=True):
        given = case.args["delta_ptr"]
        if case.name == "chunk_grad_kernel":
            cases.append((case, dict.fromkeys(("y_ptr", "dy_ptr", "dz_ptr"), given)))
        else:
            cases.append((case, {"z_ptr": None, "dz_ptr": None, "added_ptr": given}))
    return [
        replace(
            case, args=case.args | change, config=f"{case.config} of two", minor=case.args["d_state"] != 16
        )
        for case, change in cases
    ]

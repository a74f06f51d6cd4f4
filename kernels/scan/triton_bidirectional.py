"""Triton bidirectional scan: two scans against each other's direction, of which one continues the other's work.

    out = (y + y') * silu(z), y and y' those of a scan in time's order and of one in reverse

Forward: the first scan writes its y, without a gate; the second adds its own to it, gates the sum, writes it as
the output and, where gradients are wanted, keeps the sum. The skip connections of one u are one, (D + D') u.

Backward: the gate's part is done once, by the first scan's `chunk_grad_kernel`, which reads dout, z and the sum
anyway or almost, and leaves dz and dy = dout * silu(z). The gradients of either scan are then those of a scan
without a gate, and its y is not computed again. The second scan adds its du to that of the first. So nothing is
added up in passes of its own.
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
    u_reverse: Tensor | None,
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

    u_reverse: what `back` scans, None for u. Returns out, shape and dtype of u, and what
    `bidirectional_scan_bwd` needs: the sum before the gate (None unless `keep` and z) and the states entering
    the chunks of either direction.
    """
    delta, A, B, C, D, bias = ahead.parts()
    delta_r, A_r, B_r, C_r, D_r, bias_r = back.parts()
    if u_reverse is None:
        D, D_r, u_reverse = _joint(D, D_r), None, u
    y, _, states = selective_scan_fwd(
        u, delta, A, B, C, D, None, bias, delta_softplus, None, seqs, False, launch=launch
    )
    keep = keep and z is not None
    out, _, states_r = selective_scan_fwd(
        u_reverse, delta_r, A_r, B_r, C_r, D_r, z, bias_r, delta_softplus, None, seqs, True, launch=launch,
        added=y, keep=keep,
    )  # fmt: skip
    return out, y if keep else None, states, states_r


def bidirectional_scan_bwd(
    dout: Tensor,
    u: Tensor,
    u_reverse: Tensor | None,
    ahead: ScanDirection,
    back: ScanDirection,
    z: Tensor | None,
    delta_softplus: bool,
    seqs: Sequences | None,
    y: Tensor | None,
    states: Tensor,
    states_r: Tensor,
    *,
    launch: ScanLaunch | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...], Tensor | None]:
    """Gradients of `bidirectional_scan_fwd` with `keep`: to u, u_reverse, ahead, back and z, None for None.

    y, states, states_r: what the forward returned.
    """
    delta, A, B, C, D, bias = ahead.parts()
    delta_r, A_r, B_r, C_r, D_r, bias_r = back.parts()
    one = u_reverse is None
    skip, skip_r = (_joint(D, D_r), None) if one else (D, D_r)
    dy = None if y is None else torch.empty_like(y)
    du, ddelta, dA, dB, dC, dskip, dz, dbias, _ = selective_scan_bwd(
        dout, None, u, delta, A, B, C, skip, z, bias, delta_softplus, None, seqs, False, states,
        launch=launch, y=y, dy=dy,
    )  # fmt: skip
    du_r, ddelta_r, dA_r, dB_r, dC_r, dskip_r, _, dbias_r, _ = selective_scan_bwd(
        dout if dy is None else dy, None, u if u_reverse is None else u_reverse, delta_r, A_r, B_r, C_r, skip_r,
        None, bias_r, delta_softplus, None, seqs, True, states_r,
        launch=launch, added=du if one else None,
    )  # fmt: skip
    if one:
        # Both skip connections have the same gradient; a custom op must not return a tensor twice.
        dskip_r = None if D_r is None or dskip is None else dskip.clone()
        dskip = None if D is None else dskip
    return (
        du,
        None if one else du_r,
        (ddelta, dA, dB, dC, dskip, dbias),
        (ddelta_r, dA_r, dB_r, dC_r, dskip_r, dbias_r),
        dz,
    )


def _joint(D: Tensor | None, D_r: Tensor | None) -> Tensor | None:
    """The skip connection of both directions."""
    if D is None or D_r is None:
        return D if D_r is None else D_r
    return D + D_r


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

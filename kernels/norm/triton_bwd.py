"""Backward Triton kernel of `rms_norm`.

Each of a fixed number of programs takes every so many-th tile of rows and keeps its own partial sum for the
gradient of the weight; the partial sums are added in a fixed order afterwards, so two runs agree to the bit.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.norm.launch import AOT_SHAPES, NormLaunch, backward_programs, norm_launch
from ssm_modal.kernels.norm.triton_common import aot_arguments, aot_config, as_rows, load
from ssm_modal.kernels.triton_math import sigmoid, silu
from ssm_modal.kernels.triton_stores import store_held
from ssm_modal.kernels.triton_sums import column_sums


@triton.jit
def _load_grads(
    dout_row, s_row, gate_row, weight_row, scale, c, mask,
    WEIGHT: tl.constexpr, GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Of one tile, in fp32: s, gate, normed h, weight, dL/dout, and dL/d(normed h)."""
    s = load(s_row, c, mask)
    dout = load(dout_row, c, mask)
    gate, normed, dnormed = s, s * scale[:, None], dout
    taps = s
    if GATE_FIRST or GATE_LAST:
        gate = load(gate_row, c, mask)
    if GATE_FIRST:
        normed *= silu(gate)
    if WEIGHT:
        taps = load(weight_row, c, mask)
        dnormed *= taps
    if GATE_LAST:
        dnormed *= silu(gate)
    return s, gate, normed, taps, dout, dnormed


@triton.jit
def _store_grads(
    s, gate, normed, taps, dout, dnormed, mean, scale,
    dx, dresidual, dgate, at, dtotal_row, c, mask,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, DTOTAL: tl.constexpr,
    GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x, residual and gate; returns that of the weight. mean: of normed * dnormed."""
    ds = scale[:, None] * (dnormed - normed * mean[:, None])
    dweight = dout * normed
    if GATE_FIRST or GATE_LAST:
        p = sigmoid(gate)
        slope = p + gate * p * (1.0 - p)
        if GATE_LAST:
            dg = dweight * slope
            if WEIGHT:
                dg *= taps
            dweight *= gate * p
        else:
            dg = ds * s * slope
            ds *= gate * p
        tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=mask)
    if DTOTAL:
        ds += load(dtotal_row, c, mask)
    tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=mask)
    if RESIDUAL:
        tl.store(dresidual + at, ds.to(dresidual.dtype.element_ty), mask=mask)
    return dweight


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    dout,  # (rows, groups * width), rows dout_stride apart
    dtotal,  # as dout
    s,  # as dout: x, or its sum with the residual
    weight,  # (groups * width,)
    gate,  # as dout
    rstd,  # (rows, groups) fp32
    dx,  # (rows, groups * width), contiguous
    dresidual,  # as dx
    dgate,  # as dx
    partial,  # (programs, groups * width) fp32; zeros unless ONE
    dout_stride,
    dtotal_stride,
    s_stride,
    gate_stride,
    rows,
    groups,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DTOTAL: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
):
    program = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    programs = tl.num_programs(0) // groups
    channel = group * width
    weight_row = weight + channel
    partial += (program * groups + group) * width
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    first = program * ROWS
    while first < rows:
        row = first + r
        there = (row < rows)[:, None]
        index = row * groups + group
        scale = tl.load(rstd + index, mask=row < rows, other=0.0)
        dout_row = dout + (row * dout_stride + channel)[:, None]
        dtotal_row = dtotal + (row * dtotal_stride + channel)[:, None]
        s_row = s + (row * s_stride + channel)[:, None]
        gate_row = gate + (row * gate_stride + channel)[:, None]
        at_row = (index * width)[:, None]
        if ONE:
            mask = there & (c < width)
            sv, gv, normed, taps, g, dnormed = _load_grads(
                dout_row, s_row, gate_row, weight_row, scale, c, mask, WEIGHT, GATE_FIRST, GATE_LAST
            )
            mean = tl.sum(normed * dnormed, 1) / width
            dweight += _store_grads(
                sv, gv, normed, taps, g, dnormed, mean, scale,
                dx, dresidual, dgate, at_row + c, dtotal_row, c, mask,
                WEIGHT, RESIDUAL, DTOTAL, GATE_FIRST, GATE_LAST,
            )  # fmt: skip
        else:
            sums = tl.zeros((ROWS, BLOCK), tl.float32)
            at = width * 0
            while at < width:
                mask = there & (at + c < width)
                sv, gv, normed, taps, g, dnormed = _load_grads(
                    dout_row, s_row, gate_row, weight_row, scale, at + c, mask, WEIGHT, GATE_FIRST, GATE_LAST
                )
                sums += normed * dnormed
                at += BLOCK
            mean = tl.sum(sums, 1) / width
            at = width * 0
            while at < width:
                mask = there & (at + c < width)
                sv, gv, normed, taps, g, dnormed = _load_grads(
                    dout_row, s_row, gate_row, weight_row, scale, at + c, mask, WEIGHT, GATE_FIRST, GATE_LAST
                )
                dw = _store_grads(
                    sv, gv, normed, taps, g, dnormed, mean, scale,
                    dx, dresidual, dgate, at_row + at + c, dtotal_row, at + c, mask,
                    WEIGHT, RESIDUAL, DTOTAL, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                if WEIGHT:
                    # Too wide for registers: this program's own line of partial sums holds them.
                    dw += load(partial, at + c, mask)
                    tl.store(partial + at + c, dw, mask=mask)
                at += BLOCK
            # The next row's loads of `partial` may lie in other threads than this row's stores.
            tl.debug_barrier()
        first += programs * ROWS
    if ONE and WEIGHT:
        if ROWS == 1:
            tl.store(partial + c, tl.sum(dweight, 0)[None, :], mask=c < width)
        else:
            store_held(partial + c, tl.sum(dweight, 0)[None, :], c < width)


def rms_norm_bwd(
    dout: Tensor,
    dtotal: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
    x_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, residual and gate (None where the argument is).

    s: x, or its sum with the residual as the forward returned it. dtotal: the gradient of that sum, or None.
    rstd: (rows, groups), from the forward. dresidual_dtype: the residual's dtype, None without one.
    """
    dim = s.shape[-1]
    groups = rstd.shape[1]
    width = dim // groups
    dout2, s2 = as_rows(dout), as_rows(s)
    rows = s2.shape[0]
    dtotal2 = dout2 if dtotal is None else as_rows(dtotal)
    gate2 = dout2 if gate is None else as_rows(gate)
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
    dresidual = None
    if dresidual_dtype is not None:
        dresidual = torch.empty(s.shape, dtype=dresidual_dtype, device=s.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=s.device)
    dweight = None
    if weight is not None:
        dweight = (torch.empty if rows else torch.zeros)(dim, dtype=weight.dtype, device=s.device)
    launch = norm_launch(width, True, gate is not None)
    programs = backward_programs(rows, groups, launch, s.device)
    make = torch.empty if launch.one else torch.zeros
    partial = make(1 if weight is None else programs, 1, dim, dtype=torch.float32, device=s.device)
    if rows > 0:
        launcher = _launcher(
            launch,
            weight is not None,
            dresidual is not None,
            dtotal is not None,
            gate is not None and not norm_before_gate,
            gate is not None and norm_before_gate,
        )
        launcher(
            (programs * groups,),
            (
                dout2,
                dtotal2,
                s2,
                s2 if weight is None else weight.contiguous(),
                gate2,
                rstd,
                dx,
                dx if dresidual is None else dresidual,
                dx if dgate is None else dgate,
                partial,
            ),
            (dout2.stride(0), dtotal2.stride(0), s2.stride(0), gate2.stride(0), rows, groups, width),
        )
        if dweight is not None:
            column_sums(partial, dweight.unsqueeze(1))
    return dx, dweight, dresidual, dgate


@functools.lru_cache(maxsize=256)
def _launcher(
    launch: NormLaunch, weight: bool, residual: bool, dtotal: bool, gate_first: bool, gate_last: bool
) -> Launcher:
    constants = {
        "ROWS": launch.rows,
        "BLOCK": launch.block,
        "ONE": launch.one,
        "WEIGHT": weight,
        "RESIDUAL": residual,
        "DTOTAL": dtotal,
        "GATE_FIRST": gate_first,
        "GATE_LAST": gate_last,
    }
    return Launcher(norm_backward_kernel, constants | {"num_warps": launch.warps})


def aot_cases() -> list[AotCase]:
    """Several rows a tile, one, and one in blocks; plain, with the residual, gated."""
    cases = []
    for (dim, residual, gate), dtype in itertools.product(AOT_SHAPES, ("fp32", "bf16")):
        launch = norm_launch(dim, True, gate is not None)
        given = aot_arguments(dim, residual, gate, launch)
        given |= dict.fromkeys(("dout", "gate", "dx", "dgate"), "*" + dtype)
        given |= dict.fromkeys(("dtotal", "s", "dresidual", "partial"), "*fp32")
        given |= dict.fromkeys(("dout_stride", "dtotal_stride", "s_stride"), dim)
        given |= {"rows": 16384, "DTOTAL": residual}
        config = aot_config(dim, dtype, residual, gate)
        cases.append(
            AotCase(norm_backward_kernel, config, given, num_warps=launch.warps, minor=dtype == "fp32")
        )
    return cases

"""Triton kernels of `rms_norm`, forward and backward.

One program takes whole rows (a row is one group of channels of one position) and sums in fp32. Rows of up to
`WHOLE` channels stay in registers; wider ones go through in blocks, twice. Backward, each of a fixed number
of programs takes every so many-th row and keeps its own partial sum for the gradient of the weight; the
partial sums are added in a fixed order afterwards, so two runs agree to the bit.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.norm.ref import residual_dtype

WHOLE = 4096


@triton.jit
def _silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def _load(row, c, mask):
    return tl.load(row + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_sum(x_row, residual_row, total_row, c, mask, RESIDUAL: tl.constexpr):
    """x, or its sum with the residual, rounded as it is returned; fp32."""
    s = _load(x_row, c, mask)
    if RESIDUAL:
        s = (s + _load(residual_row, c, mask)).to(total_row.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _finish(
    s, h, scale, out_row, total_row, gate_row, weight_row, c, mask,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Store the sum s and the output, h being what is normalised."""
    if RESIDUAL:
        tl.store(total_row + c, s.to(total_row.dtype.element_ty), mask=mask)
    y = h * scale
    if WEIGHT:
        y *= _load(weight_row, c, mask)
    if GATE_LAST:
        y *= _silu(_load(gate_row, c, mask))
    tl.store(out_row + c, y.to(out_row.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x,  # (rows, groups * width), rows x_stride apart
    weight,  # (groups * width,)
    residual,  # as x
    gate,  # as x
    out,  # (rows, groups * width), contiguous
    total,  # as out: the sum of x and residual
    rstd,  # (rows, groups) fp32: 1 / sqrt(mean of squares + eps)
    x_stride,
    residual_stride,
    gate_stride,
    groups,
    width,
    eps,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, channel = index // groups, (index % groups) * width
    x_row = x + row * x_stride + channel
    residual_row = residual + row * residual_stride + channel
    gate_row = gate + row * gate_stride + channel
    weight_row = weight + channel
    out_row, total_row = out + index * width, total + index * width
    c = tl.arange(0, BLOCK)
    if ONE:
        mask = c < width
        s = _load_sum(x_row, residual_row, total_row, c, mask, RESIDUAL)
        h = s
        if GATE_FIRST:
            h *= _silu(_load(gate_row, c, mask))
        scale = tl.rsqrt(tl.sum(h * h, 0) / width + eps)
        _finish(
            s, h, scale, out_row, total_row, gate_row, weight_row, c, mask, WEIGHT, RESIDUAL, GATE_LAST
        )  # fmt: skip
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        at = index * 0
        while at < width:
            mask = at + c < width
            h = _load_sum(x_row, residual_row, total_row, at + c, mask, RESIDUAL)
            if GATE_FIRST:
                h *= _silu(_load(gate_row, at + c, mask))
            squares += h * h
            at += BLOCK
        scale = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        at = index * 0
        while at < width:
            mask = at + c < width
            s = _load_sum(x_row, residual_row, total_row, at + c, mask, RESIDUAL)
            h = s
            if GATE_FIRST:
                h *= _silu(_load(gate_row, at + c, mask))
            _finish(
                s, h, scale, out_row, total_row, gate_row, weight_row, at + c, mask,
                WEIGHT, RESIDUAL, GATE_LAST,
            )  # fmt: skip
            at += BLOCK
    tl.store(rstd + index, scale)


@triton.jit
def _load_grads(
    dout_row, s_row, gate_row, weight_row, scale, c, mask,
    WEIGHT: tl.constexpr, GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Of one block, in fp32: s, gate, normed h, weight, dL/dout, and dL/d(normed h)."""
    s = _load(s_row, c, mask)
    dout = _load(dout_row, c, mask)
    gate, normed, dnormed = s, s * scale, dout
    taps = s
    if GATE_FIRST or GATE_LAST:
        gate = _load(gate_row, c, mask)
    if GATE_FIRST:
        normed *= _silu(gate)
    if WEIGHT:
        taps = _load(weight_row, c, mask)
        dnormed *= taps
    if GATE_LAST:
        dnormed *= _silu(gate)
    return s, gate, normed, taps, dout, dnormed


@triton.jit
def _store_grads(
    s, gate, normed, taps, dout, dnormed, mean, scale,
    dx_row, dresidual_row, dgate_row, dtotal_row, c, mask,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, DTOTAL: tl.constexpr,
    GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x, residual and gate; returns that of the weight. mean: of normed * dnormed."""
    ds = scale * (dnormed - normed * mean)
    dweight = dout * normed
    if GATE_FIRST or GATE_LAST:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        slope = sigmoid + silu * (1.0 - sigmoid)
        if GATE_LAST:
            dgate = dweight * slope
            if WEIGHT:
                dgate *= taps
            dweight *= silu
        else:
            dgate = ds * s * slope
            ds *= silu
        tl.store(dgate_row + c, dgate.to(dgate_row.dtype.element_ty), mask=mask)
    if DTOTAL:
        ds += _load(dtotal_row, c, mask)
    tl.store(dx_row + c, ds.to(dx_row.dtype.element_ty), mask=mask)
    if RESIDUAL:
        tl.store(dresidual_row + c, ds.to(dresidual_row.dtype.element_ty), mask=mask)
    return dweight


@triton.jit
def _backward_kernel(
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
    c = tl.arange(0, BLOCK)
    dweight = tl.zeros((BLOCK,), tl.float32)
    row = program
    while row < rows:
        index = row * groups + group
        scale = tl.load(rstd + index)
        dout_row = dout + row * dout_stride + channel
        dtotal_row = dtotal + row * dtotal_stride + channel
        s_row = s + row * s_stride + channel
        gate_row = gate + row * gate_stride + channel
        dx_row = dx + index * width
        dresidual_row, dgate_row = dresidual + index * width, dgate + index * width
        if ONE:
            mask = c < width
            sv, gv, normed, taps, g, dnormed = _load_grads(
                dout_row, s_row, gate_row, weight_row, scale, c, mask, WEIGHT, GATE_FIRST, GATE_LAST
            )
            mean = tl.sum(normed * dnormed, 0) / width
            dweight += _store_grads(
                sv, gv, normed, taps, g, dnormed, mean, scale,
                    dx_row, dresidual_row, dgate_row, dtotal_row,
                c, mask, WEIGHT, RESIDUAL, DTOTAL, GATE_FIRST, GATE_LAST,
            )  # fmt: skip
        else:
            sums = tl.zeros((BLOCK,), tl.float32)
            at = row * 0
            while at < width:
                mask = at + c < width
                sv, gv, normed, taps, g, dnormed = _load_grads(
                    dout_row, s_row, gate_row, weight_row, scale, at + c, mask, WEIGHT, GATE_FIRST, GATE_LAST
                )
                sums += normed * dnormed
                at += BLOCK
            mean = tl.sum(sums, 0) / width
            at = row * 0
            while at < width:
                mask = at + c < width
                sv, gv, normed, taps, g, dnormed = _load_grads(
                    dout_row, s_row, gate_row, weight_row, scale, at + c, mask, WEIGHT, GATE_FIRST, GATE_LAST
                )
                dw = _store_grads(
                    sv, gv, normed, taps, g, dnormed, mean, scale,
                    dx_row, dresidual_row, dgate_row, dtotal_row,
                    at + c, mask, WEIGHT, RESIDUAL, DTOTAL, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                if WEIGHT:
                    # Too wide for registers: this program's own line of partial sums holds them.
                    dw += _load(partial, at + c, mask)
                    tl.store(partial + at + c, dw, mask=mask)
                at += BLOCK
            # The next row's loads of `partial` may lie in other threads than this row's stores.
            tl.debug_barrier()
        row += programs
    if ONE and WEIGHT:
        tl.store(partial + c, dweight, mask=c < width)


def _launch(width: int) -> tuple[int, bool, int]:
    """(channels a block, whether a row is one block, warps): at most 16 channels a thread."""
    one = width <= WHOLE
    # Rows in several blocks keep two loops' addresses: half a block leaves them the registers.
    block = max(16, triton.next_power_of_2(width)) if one else max(16, WHOLE // 2)
    return block, one, max(1, min(8, block // 256))


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs of the backward: a few for each multiprocessor, so a few partial sums for each weight."""
    if device.type != "cuda":
        return 3
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def _as_rows(t: Tensor) -> Tensor:
    """(..., dim) as (rows, dim) with neighbouring channels; a copy only where strides leave no other way."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rms_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, x + residual or None, rstd), arguments as `rms_norm` has checked them.

    out: x's shape and dtype. rstd: (rows, groups) fp32, 1 / sqrt(mean of squares + eps), for the backward.
    """
    dim = x.shape[-1]
    width = dim if group_size is None else group_size
    groups = dim // width
    x2 = _as_rows(x)
    rows = x2.shape[0]
    residual2 = x2 if residual is None else _as_rows(residual)
    gate2 = x2 if gate is None else _as_rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None
    if residual is not None:
        dtype = residual_dtype(residual.dtype, residual_in_fp32)
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    block, one, warps = _launch(width)
    if rows > 0:
        with torch.cuda.device_of(x):
            _forward_kernel[(rows * groups,)](
                x2,
                x2 if weight is None else weight.contiguous(),
                residual2,
                gate2,
                out,
                out if total is None else total,
                rstd,
                x2.stride(0),
                residual2.stride(0),
                gate2.stride(0),
                groups,
                width,
                eps,
                BLOCK=block,
                ONE=one,
                WEIGHT=weight is not None,
                RESIDUAL=residual is not None,
                GATE_FIRST=gate is not None and not norm_before_gate,
                GATE_LAST=gate is not None and norm_before_gate,
                num_warps=warps,
            )
    return out, total, rstd


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
    dout2, s2 = _as_rows(dout), _as_rows(s)
    rows = s2.shape[0]
    dtotal2 = dout2 if dtotal is None else _as_rows(dtotal)
    gate2 = dout2 if gate is None else _as_rows(gate)
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
    dresidual = None
    if dresidual_dtype is not None:
        dresidual = torch.empty(s.shape, dtype=dresidual_dtype, device=s.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=s.device)
    block, one, warps = _launch(width)
    programs = min(rows, max(1, _programs(s.device) // groups))
    make = torch.empty if one else torch.zeros
    partial = make(programs if weight is not None else 1, dim, dtype=torch.float32, device=s.device)
    if rows > 0:
        with torch.cuda.device_of(s):
            _backward_kernel[(programs * groups,)](
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
                dout2.stride(0),
                dtotal2.stride(0),
                s2.stride(0),
                gate2.stride(0),
                rows,
                groups,
                width,
                BLOCK=block,
                ONE=one,
                WEIGHT=weight is not None,
                RESIDUAL=dresidual is not None,
                DTOTAL=dtotal is not None,
                GATE_FIRST=gate is not None and not norm_before_gate,
                GATE_LAST=gate is not None and norm_before_gate,
                num_warps=warps,
            )
    dweight = None if weight is None else partial.sum(0).to(weight.dtype)
    return dx, dweight, dresidual, dgate


def aot_cases() -> list[AotCase]:
    """The shipped shapes of program: rows in one block and in several, plain, with the residual, gated."""
    cases = []
    shapes: list[tuple[int, bool, str | None]] = [
        (256, False, None),
        (1024, True, None),
        (4096, True, "last"),
        (4096, False, "first"),
        (4095, True, "first"),
        (12289, True, "first"),
    ]
    for (dim, residual, gate), dtype in itertools.product(shapes, ("fp32", "bf16")):
        block, one, warps = _launch(dim)
        config = f"dim {dim} {dtype}{' residual' if residual else ''}{f' gate {gate}' if gate else ''}"
        given = dict.fromkeys(("x", "gate", "out"), "*" + dtype)
        given |= dict.fromkeys(("weight", "residual", "total", "rstd"), "*fp32")
        options = {"BLOCK": block, "ONE": one, "WEIGHT": True, "RESIDUAL": residual}
        options |= {"GATE_FIRST": gate == "first", "GATE_LAST": gate == "last"}
        shared: dict[str, Any] = {"gate_stride": dim, "groups": 1, "width": dim, **options}
        forward = given | shared | {"x_stride": dim, "residual_stride": dim, "eps": 1e-5}
        cases.append(AotCase(_forward_kernel, config, forward, num_warps=warps))
        given = dict.fromkeys(("dout", "gate", "dx", "dgate"), "*" + dtype)
        given |= dict.fromkeys(("dtotal", "s", "weight", "rstd", "dresidual", "partial"), "*fp32")
        strides = {"dout_stride": dim, "dtotal_stride": dim, "s_stride": dim, "rows": 16384}
        backward = given | shared | strides | {"DTOTAL": residual}
        cases.append(AotCase(_backward_kernel, config, backward, num_warps=warps))
    return cases

"""Forward Triton kernel of `rms_norm`."""

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
from ssm_modal.kernels.norm.launch import AOT_SHAPES, NormLaunch, norm_launch
from ssm_modal.kernels.norm.ref import residual_dtype
from ssm_modal.kernels.norm.triton_common import aot_arguments, aot_config, as_rows, load
from ssm_modal.kernels.triton_math import silu
from ssm_modal.kernels.triton_stores import store_held


@triton.jit
def _load_sum(x_row, residual_row, total, c, mask, RESIDUAL: tl.constexpr):
    """x, or its sum with the residual, rounded as it is returned; fp32."""
    s = load(x_row, c, mask)
    if RESIDUAL:
        s = (s + load(residual_row, c, mask)).to(total.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _finish(
    s, h, scale, out, total, at, gate_row, weight_row, c, mask,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Store the sum s and the output, h being what is normalised."""
    if RESIDUAL:
        tl.store(total + at, s.to(total.dtype.element_ty), mask=mask)
    y = h * scale[:, None]
    if WEIGHT:
        y *= load(weight_row, c, mask)
    if GATE_LAST:
        y *= silu(load(gate_row, c, mask))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def norm_forward_kernel(
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
    count,  # rows * groups
    groups,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (index < count)[:, None]
    row, channel = index // groups, (index % groups) * width
    x_row = x + (row * x_stride + channel)[:, None]
    residual_row = residual + (row * residual_stride + channel)[:, None]
    gate_row = gate + (row * gate_stride + channel)[:, None]
    weight_row = weight + channel[:, None]
    at_row = (index * width)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    if ONE:
        mask = there & (c < width)
        s = _load_sum(x_row, residual_row, total, c, mask, RESIDUAL)
        h = s
        if GATE_FIRST:
            h *= silu(load(gate_row, c, mask))
        scale = tl.rsqrt(tl.sum(h * h, 1) / width + eps)
        _finish(
            s, h, scale, out, total, at_row + c, gate_row, weight_row, c, mask, WEIGHT, RESIDUAL, GATE_LAST
        )  # fmt: skip
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        at = width * 0
        while at < width:
            mask = there & (at + c < width)
            h = _load_sum(x_row, residual_row, total, at + c, mask, RESIDUAL)
            if GATE_FIRST:
                h *= silu(load(gate_row, at + c, mask))
            squares += h * h
            at += BLOCK
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)
        at = width * 0
        while at < width:
            mask = there & (at + c < width)
            s = _load_sum(x_row, residual_row, total, at + c, mask, RESIDUAL)
            h = s
            if GATE_FIRST:
                h *= silu(load(gate_row, at + c, mask))
            _finish(
                s, h, scale, out, total, at_row + at + c, gate_row, weight_row, at + c, mask,
                WEIGHT, RESIDUAL, GATE_LAST,
            )  # fmt: skip
            at += BLOCK
    if ROWS == 1:
        tl.store(rstd + tl.program_id(0).to(tl.int64), tl.sum(scale, 0))
    else:
        store_held(rstd + index, scale, index < count)


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
    x2 = as_rows(x)
    rows = x2.shape[0]
    residual2 = x2 if residual is None else as_rows(residual)
    gate2 = x2 if gate is None else as_rows(gate)
    out = x.new_empty(x.shape)
    total = None
    if residual is not None:
        dtype = residual_dtype(residual.dtype, residual_in_fp32)
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    launch = norm_launch(width, False, gate is not None)
    if rows > 0:
        gate_first = gate is not None and not norm_before_gate
        gate_last = gate is not None and norm_before_gate
        launcher = _launcher(launch, weight is not None, residual is not None, gate_first, gate_last)
        launcher(
            (-(-rows * groups // launch.rows),),
            (
                x2,
                x2 if weight is None else weight.contiguous(),
                residual2,
                gate2,
                out,
                out if total is None else total,
                rstd,
            ),
            (x2.stride(0), residual2.stride(0), gate2.stride(0), rows * groups, groups, width, float(eps)),
        )
    return out, total, rstd


@functools.lru_cache(maxsize=256)
def _launcher(
    launch: NormLaunch, weight: bool, residual: bool, gate_first: bool, gate_last: bool
) -> Launcher:
    constants = {
        "ROWS": launch.rows,
        "BLOCK": launch.block,
        "ONE": launch.one,
        "WEIGHT": weight,
        "RESIDUAL": residual,
        "GATE_FIRST": gate_first,
        "GATE_LAST": gate_last,
    }
    return Launcher(norm_forward_kernel, constants | {"num_warps": launch.warps})


def aot_cases() -> list[AotCase]:
    """Several rows a tile, one, and one in blocks; plain, with the residual, gated."""
    cases = []
    for (dim, residual, gate), dtype in itertools.product(AOT_SHAPES, ("fp32", "bf16")):
        launch = norm_launch(dim, False, gate is not None)
        given = aot_arguments(dim, residual, gate, launch)
        given |= dict.fromkeys(("x", "gate", "out"), "*" + dtype)
        given |= dict.fromkeys(("residual", "total"), "*fp32")
        given |= {"x_stride": dim, "residual_stride": dim, "count": 16384, "eps": 1e-5}
        config = aot_config(dim, dtype, residual, gate)
        cases.append(
            AotCase(norm_forward_kernel, config, given, num_warps=launch.warps, minor=dtype == "fp32")
        )
    return cases

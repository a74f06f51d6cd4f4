"""Triton kernel of one step of `causal_conv1d`: one launch, nothing read back, graph-capturable.

A program takes a block of channels of one row, their windows (the state and the present input) in a tile
[BLOCK_D, BLOCK_K]. The state may be written over where it was read: each element moves one place towards the
past, so all of a program's are read before the first is written.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.triton_math import silu
from ssm_modal.kernels.triton_stores import store_held

# Elements of the windows of one program, and warps.
TILE, WARPS = 256, 4
# Of fewer channels than threads Triton loads a row where it is needed; of as many it exchanges them.
CHANNELS = 64


@triton.jit(do_not_specialize=["x_stride_b"])
def conv_step_kernel(
    x,  # (batch, d_inner), any strides
    weight,  # (d_inner, K)
    bias,  # (d_inner,)
    state,  # (batch, d_inner, K - 1), any strides
    out,  # (batch, d_inner), contiguous
    new_state,  # (batch, d_inner, K - 1), any strides; may be `state`
    d_inner,
    x_stride_b,
    x_stride_d,
    w_stride_d,
    w_stride_k,
    b_stride,
    s_stride_b,
    s_stride_d,
    s_stride_k,
    n_stride_b,
    n_stride_d,
    n_stride_k,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    blocks_d = tl.cdiv(d_inner, BLOCK_D)
    row = (tl.program_id(0) // blocks_d).to(tl.int64)
    lane = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = lane < d_inner
    d = lane.to(tl.int64)
    k = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    column, mask = d[:, None], d_mask[:, None]

    present = tl.load(x + row * x_stride_b + d * x_stride_d, mask=d_mask, other=0.0)
    past = tl.load(
        state + row * s_stride_b + column * s_stride_d + k * s_stride_k, mask=mask & (k < K - 1), other=0.0
    )
    window = tl.where(k == K - 1, present[:, None], past)
    taps = tl.load(weight + column * w_stride_d + k * w_stride_k, mask=mask & (k < K), other=0.0)
    y = tl.sum(window.to(tl.float32) * taps.to(tl.float32), 1)
    if HAS_BIAS:
        y += tl.load(bias + d * b_stride, mask=d_mask, other=0.0).to(tl.float32)
    if SILU:
        y = silu(y)
    store_held(out + row * d_inner + d, y.to(out.dtype.element_ty), d_mask)
    # An element is written by another thread than reads what stood there.
    tl.debug_barrier()
    tl.store(
        new_state + row * n_stride_b + column * n_stride_d + (k - 1) * n_stride_k,
        window,
        mask=mask & (k >= 1) & (k < K),
    )


def _blocks(d_inner: int, taps: int) -> tuple[int, int]:
    """(channels, padded taps) of a program."""
    block_k = 1 << (taps - 1).bit_length()
    return max(2, min(TILE // block_k, CHANNELS, 1 << (d_inner - 1).bit_length())), block_k


def causal_conv1d_step_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool, new_state: Tensor
) -> Tensor:
    """Write the state after the step into `new_state`, which may be `state`; returns out (batch, d_inner).

    Arguments as `causal_conv1d_step` has checked them.
    """
    batch, d_inner = x.shape
    taps = weight.shape[1]
    out = x.new_empty((batch, d_inner))
    if batch * d_inner == 0:
        return out
    launcher = _launcher(d_inner, taps, bias is not None, silu)
    launcher(
        (batch * -(-d_inner // launcher.constants["BLOCK_D"]),),
        (x, weight, x if bias is None else bias, state, out, new_state),
        (
            d_inner,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            *state.stride(),
            *new_state.stride(),
        ),
    )
    return out


@functools.lru_cache(maxsize=256)
def _launcher(d_inner: int, taps: int, has_bias: bool, silu: bool) -> Launcher:
    block_d, block_k = _blocks(d_inner, taps)
    constants = {"K": taps, "BLOCK_D": block_d, "BLOCK_K": block_k, "HAS_BIAS": has_bias, "SILU": silu}
    return Launcher(conv_step_kernel, constants | {"num_warps": WARPS})


def aot_cases() -> list[AotCase]:
    """The usual window and a wide one."""
    cases = []
    for taps, dtype in ((4, "bf16"), (4, "fp32"), (16, "bf16")):
        d_inner = 2048
        block_d, block_k = _blocks(d_inner, taps)
        given = dict.fromkeys(("x", "weight", "bias", "state", "out", "new_state"), "*" + dtype)
        given |= {"d_inner": d_inner, "x_stride_b": 2 * d_inner, "x_stride_d": 1}
        given |= {"w_stride_d": taps, "w_stride_k": 1, "b_stride": 1}
        for m in ("s", "n"):
            given |= {f"{m}_stride_b": d_inner * (taps - 1), f"{m}_stride_d": taps - 1, f"{m}_stride_k": 1}
        given |= {"K": taps, "BLOCK_D": block_d, "BLOCK_K": block_k, "HAS_BIAS": True, "SILU": True}
        cases.append(AotCase(conv_step_kernel, f"d_conv {taps} {dtype}", given, num_warps=WARPS))
    return cases

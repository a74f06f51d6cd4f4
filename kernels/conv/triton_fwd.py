"""Forward Triton kernel of `causal_conv1d`. How it walks is told in `triton_common`.

Memory bound: it reads x and writes out once, 4 bytes an element in bf16.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools
import itertools

import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.conv.launch import ConvLaunch, conv_launch
from ssm_modal.kernels.conv.triton_common import (
    AOT_SHAPES,
    aot_arguments,
    channels,
    check_taps,
    convolved,
    has_empty,
    in_scan_order,
    parameters,
    plan,
    span,
    window_before,
)
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.kernels.triton_math import sigmoid


@triton.jit(do_not_specialize=["length", "n_chunks", "steps"])
def conv_forward_kernel(
    x,  # (batch, length, d_inner), any strides
    weight,  # (d_inner, K)
    bias,  # (d_inner,)
    initial_state,  # (rows, d_inner, K - 1), any strides
    out,  # (batch, length, d_inner), contiguous
    final_state,  # (rows, d_inner, K - 1), contiguous
    cu_seqlens,  # (sequences + 1,) int64
    chunk_start,  # (chunks,) int64
    chunk_seq,  # (chunks,) int64
    length,
    d_inner,
    n_chunks,
    steps,  # of a chunk
    x_stride_b,
    x_stride_l,
    x_stride_d,
    out_stride_b,
    w_stride_d,
    w_stride_k,
    b_stride,
    i_stride_r,
    i_stride_d,
    i_stride_k,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
):
    chunk, d, d_mask = channels(d_inner, BLOCK_D)
    row, first, n, s0 = span(cu_seqlens, chunk_start, chunk_seq, length, n_chunks, chunk, steps, PACKED)
    s1 = tl.minimum(s0 + steps, n)
    x_scan, x_step = in_scan_order(
        x, row, first, n, x_stride_b, x_stride_l, d, x_stride_d, PACKED, REVERSE
    )  # fmt: skip
    out_scan, out_step = in_scan_order(out, row, first, n, out_stride_b, d_inner, d, 1, PACKED, REVERSE)
    taps, shift = parameters(weight, bias, w_stride_d, w_stride_k, b_stride, d, d_mask, K, HAS_BIAS)
    state = (initial_state + row * i_stride_r, i_stride_d, i_stride_k)
    window = window_before(x_scan, x_step, state, d, d_mask, s0, K, HAS_STATE)

    s = s0
    while s < s1:
        rows = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (tl.load(x_scan + (s + u) * x_step, mask=d_mask & (s + u < s1), other=0.0),)
        for u in tl.static_range(UNROLL):
            window = window[1:] + (rows[u].to(tl.float32),)
            y = convolved(window, taps, shift, K)
            if SILU:
                y *= sigmoid(y)
            tl.store(out_scan + (s + u) * out_step, y.to(out.dtype.element_ty), mask=d_mask & (s + u < s1))
        s += UNROLL

    if s1 == n:
        # The last K - 1 inputs, read again: the window has run past them where the unrolled loop overshot.
        final = window_before(x_scan, x_step, state, d, d_mask, n, K, HAS_STATE)
        for i in tl.static_range(K - 1):
            at = final_state + (row * d_inner + d) * (K - 1) + i
            tl.store(at, final[i + 1].to(final_state.dtype.element_ty), mask=d_mask)


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    launch: ConvLaunch | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, d_inner) and final state (rows, d_inner, d_conv - 1), contiguous, in x's dtype.

    Arguments as `causal_conv1d` has checked them; `launch` overrides the table's. Raises ValueError above
    `MAX_D_CONV` taps.
    """
    check_taps(weight)
    d_inner, taps = weight.shape
    batch, length, _ = x.shape
    out = x.new_empty((batch, length, d_inner))
    final = x.new_empty(batch if seqs is None else seqs.n, d_inner, taps - 1)
    if has_empty(x, seqs):
        final.zero_() if initial_state is None else final.copy_(initial_state)
    if x.numel() == 0:
        return out, final
    if launch is None:
        launch = conv_launch(batch * length, d_inner, taps, False, x.element_size())
    chunks, tables, per_row = plan(x, seqs, launch.steps)
    state = x if initial_state is None else initial_state
    launcher = _launcher(
        launch,
        taps,
        bias is not None,
        initial_state is not None and taps > 1,
        seqs is not None,
        silu,
        reverse,
    )
    launcher(
        (chunks * -(-d_inner // launch.block_d),),
        (x, weight, x if bias is None else bias, state, out, final, *tables),
        (
            length,
            d_inner,
            per_row,
            launch.steps,
            *x.stride(),
            length * d_inner,
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            *state.stride(),
        ),
    )
    return out, final


@functools.lru_cache(maxsize=256)
def _launcher(
    launch: ConvLaunch,
    taps: int,
    has_bias: bool,
    has_state: bool,
    packed: bool,
    silu: bool,
    reverse: bool,
) -> Launcher:
    constants = {
        "K": taps,
        "BLOCK_D": launch.block_d,
        "UNROLL": launch.unroll,
        "HAS_BIAS": has_bias,
        "HAS_STATE": has_state,
        "PACKED": packed,
        "SILU": silu,
        "REVERSE": reverse,
    }
    return Launcher(conv_forward_kernel, constants | {"num_warps": launch.warps, "maxnreg": launch.registers})


def aot_cases() -> list[AotCase]:
    """The shipped shapes of program, plain and with everything."""
    cases = []
    for (taps, every, d_inner), dtype in itertools.product(AOT_SHAPES, ("fp32", "bf16")):
        config = f"d_conv {taps} {dtype}{' packed reverse state' if every else ''}"
        launch = conv_launch(2048, d_inner, taps, False, 4 if dtype == "fp32" else 2)
        given = aot_arguments(taps, dtype, every, d_inner, launch)
        given |= dict.fromkeys(("out", "final_state"), "*" + dtype) | {"out_stride_b": 2048 * d_inner}
        cases.append(
            AotCase(
                conv_forward_kernel,
                config,
                given,
                num_warps=launch.warps,
                maxnreg=launch.registers,
                minor=dtype == "fp32",
            )
        )
    return cases

"""Backward Triton kernel of `causal_conv1d`. How it walks is told in `triton_common`.

With g_s = dL/d(sum before SiLU at s), which takes x around s and dout at s, the gradient of the input at e is
sum_j g_{e + j} weight[:, d_conv - 1 - j], and its share of a tap's gradient x_e g_{e + j}. So a program runs
d_conv - 1 steps ahead of the inputs it owns: it computes those g that its neighbour needs too, and each input
belongs to one program alone. Memory bound: it reads x and dout and writes dx once, 6 bytes an element in
bf16, and a row of partial sums of the taps and the bias for each chunk, added up afterwards in a fixed order:
two runs agree to the bit.
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
from ssm_modal.kernels.triton_sums import column_sums


@triton.jit
def _push(window, grads, x_row, dout_row, taps, shift, K: tl.constexpr, SILU: tl.constexpr):
    """The window and the gradients g with the next step's input and dL/dout taken in."""
    window = window[1:] + (x_row.to(tl.float32),)
    g = dout_row.to(tl.float32)
    if SILU:
        y = convolved(window, taps, shift, K)
        p = sigmoid(y)
        g *= p + y * p * (1.0 - p)
    return window, grads[1:] + (g,)


@triton.jit
def _rows(x_scan, x_step, g_scan, g_step, s, end, d_mask, UNROLL: tl.constexpr):
    """The inputs and dL/dout of steps s ... s + UNROLL - 1; zeros from step `end` on."""
    rows = ()
    upstream = ()
    for u in tl.static_range(UNROLL):
        rows = rows + (tl.load(x_scan + (s + u) * x_step, mask=d_mask & (s + u < end), other=0.0),)
        upstream = upstream + (tl.load(g_scan + (s + u) * g_step, mask=d_mask & (s + u < end), other=0.0),)
    return rows, upstream


@triton.jit
def _state_gradients(
    before, grads, dtaps, taps, kept, f_stride_k, dinitial_row, n, starts,
    K: tl.constexpr, HAS_DFINAL: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the initial state where a sequence `starts`; returns dtaps with its share.

    before[i + 1] is the input at i - (K - 1), grads[m + 1] the gradient g_m.
    """
    for i in tl.static_range(K - 1):
        old = tl.where(starts, before[i + 1], 0.0)
        value = tl.zeros_like(old)
        shares = ()
        for j in tl.static_range(K):
            if j <= i:
                value += grads[i - j + 1] * taps[j]
                shares = shares + (dtaps[j] + grads[i - j + 1] * old,)
            else:
                shares = shares + (dtaps[j],)
        dtaps = shares
        if HAS_DFINAL:
            # A sequence shorter than the window keeps it in the final state.
            value += tl.load(kept + (i - n) * f_stride_k, mask=starts & (i >= n), other=0.0).to(tl.float32)
        tl.store(dinitial_row + i, value.to(dinitial_row.dtype.element_ty), mask=starts)
    return dtaps


@triton.jit(do_not_specialize=["length", "n_chunks", "steps"])
def conv_backward_kernel(
    dout,  # (batch, length, d_inner), any strides
    dfinal,  # (rows, d_inner, K - 1), any strides
    x,  # (batch, length, d_inner), any strides
    weight,  # (d_inner, K)
    bias,  # (d_inner,)
    initial_state,  # (rows, d_inner, K - 1), any strides
    dx,  # (batch, length, d_inner), neighbouring channels
    partial,  # (chunks, K + 1, d_inner) fp32: of each chunk the gradients of the taps and of the bias
    dinitial,  # (rows, d_inner, K - 1), contiguous
    cu_seqlens,  # (sequences + 1,) int64
    chunk_start,  # (chunks,) int64
    chunk_seq,  # (chunks,) int64
    length,
    d_inner,
    n_chunks,
    steps,  # of a chunk
    g_stride_b,
    g_stride_l,
    g_stride_d,
    f_stride_r,
    f_stride_d,
    f_stride_k,
    x_stride_b,
    x_stride_l,
    x_stride_d,
    dx_stride_b,
    dx_stride_l,
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
    HAS_DFINAL: tl.constexpr,
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
    g_scan, g_step = in_scan_order(
        dout, row, first, n, g_stride_b, g_stride_l, d, g_stride_d, PACKED, REVERSE
    )  # fmt: skip
    dx_scan, dx_step = in_scan_order(dx, row, first, n, dx_stride_b, dx_stride_l, d, 1, PACKED, REVERSE)
    taps, shift = parameters(weight, bias, w_stride_d, w_stride_k, b_stride, d, d_mask, K, HAS_BIAS)
    state = (initial_state + row * i_stride_r, i_stride_d, i_stride_k)
    window = window_before(x_scan, x_step, state, d, d_mask, s0, K, HAS_STATE)
    kept = dfinal + row * f_stride_r + d * f_stride_d

    grads = ()
    dtaps = ()
    for _ in tl.static_range(K):
        grads = grads + (tl.zeros_like(shift),)
        dtaps = dtaps + (tl.zeros_like(shift),)
    dshift = tl.zeros_like(shift)

    # The first K - 1 steps, before the gradient of an input is complete.
    before = window
    head_x = ()
    head_dout = ()
    for u in tl.static_range(K - 1):
        inside = d_mask & (s0 + u < n)
        head_x = head_x + (tl.load(x_scan + (s0 + u) * x_step, mask=inside, other=0.0),)
        head_dout = head_dout + (tl.load(g_scan + (s0 + u) * g_step, mask=inside, other=0.0),)
    for u in tl.static_range(K - 1):
        window, grads = _push(window, grads, head_x[u], head_dout[u], taps, shift, K, SILU)
    if HAS_STATE:
        dtaps = _state_gradients(
            before, grads, dtaps, taps, kept, f_stride_k, dinitial + (row * d_inner + d) * (K - 1), n,
            d_mask & (s0 == 0), K, HAS_DFINAL,
        )  # fmt: skip

    e = s0
    rows, upstream = _rows(x_scan, x_step, g_scan, g_step, e + (K - 1), n, d_mask, UNROLL)
    while e < s1:
        # The next steps are on their way while these are worked on.
        ahead = e + UNROLL
        next_rows, next_upstream = _rows(
            x_scan, x_step, g_scan, g_step, ahead + (K - 1), tl.minimum(n, s1 + (K - 1)), d_mask, UNROLL
        )
        for u in tl.static_range(UNROLL):
            # Then window[0] is the input at e + u, and grads[j] is g at e + u + j. Steps past the sequence
            # bring zeros, and chunks end at s1 < n on a whole round: nothing is counted twice.
            window, grads = _push(window, grads, rows[u], upstream[u], taps, shift, K, SILU)
            value = tl.zeros_like(shift)
            shares = ()
            for j in tl.static_range(K):
                value += grads[K - 1 - j] * taps[j]
                shares = shares + (dtaps[j] + window[0] * grads[K - 1 - j],)
            dtaps = shares
            dshift += grads[0]
            if HAS_DFINAL:  # noqa: SIM102 - a constexpr apart from a run-time condition
                if (e + u >= n - (K - 1)) & (e + u < n):
                    # This input is kept in the final state.
                    at = kept + (e + u - n + K - 1) * f_stride_k
                    value += tl.load(at, mask=d_mask, other=0.0).to(tl.float32)
            tl.store(dx_scan + (e + u) * dx_step, value.to(dx.dtype.element_ty), mask=d_mask & (e + u < s1))
        e = ahead
        rows = next_rows
        upstream = next_upstream

    at = partial + chunk.to(tl.int64) * (K + 1) * d_inner + d
    for j in tl.static_range(K):
        tl.store(at + j * d_inner, dtaps[j], mask=d_mask)
    tl.store(at + K * d_inner, dshift, mask=d_mask)


def causal_conv1d_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    launch: ConvLaunch | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None where the argument is), in the arguments' dtypes.

    dout: (batch, length, d_inner). dfinal_state: (rows, d_inner, d_conv - 1) or None for zeros. `launch`
    overrides the table's. dx: where the gradient of x is written, (batch, length, d_inner) with neighbouring
    channels; None for a new tensor.
    """
    check_taps(weight)
    d_inner, taps = weight.shape
    batch, length, _ = x.shape
    if dx is None:
        dx = x.new_empty((batch, length, d_inner))
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    if dinitial is not None and has_empty(x, seqs):
        dinitial.zero_() if dfinal_state is None else dinitial.copy_(dfinal_state)
    if x.numel() == 0:
        dbias = None if bias is None else bias.new_zeros(bias.shape)
        return dx, weight.new_zeros(weight.shape), dbias, dinitial
    if launch is None:
        launch = conv_launch(batch * length, d_inner, taps, True, x.element_size())
    chunks, tables, per_row = plan(x, seqs, launch.steps)
    partial = torch.empty((chunks, taps + 1, d_inner), dtype=torch.float32, device=x.device)
    state = x if initial_state is None else initial_state
    final = x if dfinal_state is None else dfinal_state
    launcher = _launcher(
        launch,
        taps,
        bias is not None,
        initial_state is not None and taps > 1,
        dfinal_state is not None and taps > 1,
        seqs is not None,
        silu,
        reverse,
    )
    launcher(
        (chunks * -(-d_inner // launch.block_d),),
        (
            dout, final, x, weight, x if bias is None else bias, state, dx, partial,
            x if dinitial is None else dinitial, *tables,
        ),
        (
            length,
            d_inner,
            per_row,
            launch.steps,
            *dout.stride(),
            *final.stride(),
            *x.stride(),
            dx.stride(0),
            dx.stride(1),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            *state.stride(),
        ),
    )  # fmt: skip
    dweight = weight.new_empty((d_inner, taps))
    dbias = None if bias is None else bias.new_empty((d_inner,))
    column_sums(partial, dweight, dbias)
    return dx, dweight, dbias, dinitial


@functools.lru_cache(maxsize=256)
def _launcher(
    launch: ConvLaunch,
    taps: int,
    has_bias: bool,
    has_state: bool,
    has_dfinal: bool,
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
        "HAS_DFINAL": has_dfinal,
        "PACKED": packed,
        "SILU": silu,
        "REVERSE": reverse,
    }
    return Launcher(
        conv_backward_kernel, constants | {"num_warps": launch.warps, "maxnreg": launch.registers}
    )


def aot_cases() -> list[AotCase]:
    """The shipped shapes of program, plain and with everything."""
    cases = []
    for (taps, every, d_inner), dtype in itertools.product(AOT_SHAPES, ("fp32", "bf16")):
        config = f"d_conv {taps} {dtype}{' packed reverse state' if every else ''}"
        launch = conv_launch(2048, d_inner, taps, True, 4 if dtype == "fp32" else 2)
        given = aot_arguments(taps, dtype, every, d_inner, launch)
        given |= dict.fromkeys(("dout", "dfinal", "dx", "dinitial"), "*" + dtype)
        given |= {"partial": "*fp32", "HAS_DFINAL": every}
        given |= {"g_stride_b": 2048 * d_inner, "g_stride_l": d_inner, "g_stride_d": 1}
        given |= {"f_stride_r": d_inner * (taps - 1), "f_stride_d": taps - 1, "f_stride_k": 1}
        given |= {"dx_stride_b": 2048 * d_inner, "dx_stride_l": d_inner}
        cases.append(
            AotCase(
                conv_backward_kernel,
                config,
                given,
                num_warps=launch.warps,
                maxnreg=launch.registers,
                minor=dtype == "fp32",
            )
        )
    return cases

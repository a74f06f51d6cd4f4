"""What the forward and the backward Triton kernels of `causal_conv1d` share.

One program takes one block of channels (across lanes, several neighbouring ones a thread, so that a load is
up to 16 bytes) through one chunk of steps in scan order. The d_conv weights, the last d_conv inputs and,
backward, the last d_conv gradients stay in registers: every input is read once. No chunk crosses the border
of a sequence, so the inner loop knows nothing of packing; going backwards in time is a negative stride. The
loads of UNROLL steps are issued before the first of them is used: the warps of a multiprocessor together keep
more bytes under way than the memory's latency takes.

Within a sequence, s counts steps in scan order; inputs at s = -(d_conv - 1) ... -1 are the initial state.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.conv.launch import MAX_D_CONV, ConvLaunch
from ssm_modal.kernels.sequences import Sequences


@triton.jit
def channels(d_inner, BLOCK_D: tl.constexpr):
    """Of this program: its chunk (int32), its channels [BLOCK_D] (int64) and which of them there are."""
    blocks_d = tl.cdiv(d_inner, BLOCK_D)
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.program_id(0) // blocks_d, d.to(tl.int64), d < d_inner


@triton.jit
def span(cu_seqlens, chunk_start, chunk_seq, length, n_chunks, chunk, steps, PACKED: tl.constexpr):
    """Of a chunk, all int64: its row, and its sequence's first step in time, length, and first step s0."""
    if PACKED:
        row = tl.load(chunk_seq + chunk)
        first = tl.load(cu_seqlens + row)
        n = tl.load(cu_seqlens + row + 1) - first
        s0 = tl.load(chunk_start + chunk) - first
    else:
        # Divisions stay in 32 bits: in 64 they are calls.
        row = (chunk // n_chunks).to(tl.int64)
        first = row * 0
        n = first + length
        s0 = (chunk % n_chunks).to(tl.int64) * steps
    return row, first, n, s0


@triton.jit
def in_scan_order(
    ptr, row, first, n, stride_b, stride_l, d, stride_d, PACKED: tl.constexpr, REVERSE: tl.constexpr
):
    """(p, step): p + s * step points at step s of the sequence, at the channels d."""
    if not PACKED:
        ptr += row * stride_b
    step = stride_l
    if REVERSE:
        first = first + n - 1
        step = -step
    return ptr + first * stride_l + d * stride_d, step


@triton.jit
def parameters(
    weight, bias, w_stride_d, w_stride_k, b_stride, d, d_mask, K: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """The K taps and the bias of the channels d, in fp32."""
    taps = ()
    for j in tl.static_range(K):
        tap = tl.load(weight + d * w_stride_d + j * w_stride_k, mask=d_mask, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    shift = tl.zeros_like(taps[0])
    if HAS_BIAS:
        shift = tl.load(bias + d * b_stride, mask=d_mask, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def window_before(x_scan, step, state, d, d_mask, s, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """The K inputs s - K ... s - 1 in fp32 (the first of them unread), from `state` where before 0."""
    window = (tl.zeros_like(d_mask).to(tl.float32),)
    for i in tl.static_range(K - 1):
        at = s - (K - 1) + i
        value = tl.load(x_scan + at * step, mask=d_mask & (at >= 0), other=0.0).to(tl.float32)
        if HAS_STATE:
            old = state[0] + d * state[1] + (K - 1 + at) * state[2]
            value += tl.load(old, mask=d_mask & (at < 0), other=0.0).to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def convolved(window, taps, shift, K: tl.constexpr):
    """The sum before the activation at the step of window[K - 1]."""
    y = shift
    for j in tl.static_range(K):
        y += window[j] * taps[j]
    return y


def check_taps(weight: Tensor) -> None:
    """Raise ValueError where there are more taps than the kernels take."""
    if weight.shape[1] > MAX_D_CONV:
        raise ValueError(
            f"causal_conv1d: weight has d_conv {weight.shape[1]}, expected at most {MAX_D_CONV} on backend "
            "'triton'; backend 'torch' takes any"
        )


def plan(x: Tensor, seqs: Sequences | None, steps: int) -> tuple[int, tuple[Tensor, Tensor, Tensor], int]:
    """(chunks in all, (cu_seqlens, chunk starts, chunk sequences), chunks a row) for chunks of `steps`."""
    if seqs is None:
        per_row = -(-x.shape[1] // steps)
        return x.shape[0] * per_row, (x, x, x), per_row
    table = seqs.chunks(steps)
    return table.n_chunks, (seqs.cu_seqlens, table.start, table.seq), table.n_chunks


def has_empty(x: Tensor, seqs: Sequences | None) -> bool:
    """Whether a row has no step: it runs no program and hands its state through."""
    return x.shape[1] == 0 or (seqs is not None and 0 in seqs.lengths)


# Shapes of the ahead-of-time cases, (d_conv, packing with state and reverse, d_inner).
AOT_SHAPES = ((4, False, 1536), (4, True, 1536), (8, True, 1536), (MAX_D_CONV, True, 1536))


def aot_arguments(taps: int, dtype: str, every: bool, d_inner: int, launch: ConvLaunch) -> dict[str, Any]:
    """What both kernels take, by name, as a launch on contiguous inputs gives it; `every` turns on packing,
    the state and reverse."""
    length = 2048
    given = dict.fromkeys(("x", "initial_state"), "*" + dtype) | dict.fromkeys(("weight", "bias"), "*fp32")
    given |= dict.fromkeys(("cu_seqlens", "chunk_start", "chunk_seq"), "*i64" if every else "*" + dtype)
    return {
        **given,
        "length": length,
        "d_inner": d_inner,
        "n_chunks": -(-length // launch.steps),
        "steps": launch.steps,
        "x_stride_b": length * d_inner,
        "x_stride_l": d_inner,
        "x_stride_d": 1,
        "w_stride_d": taps,
        "w_stride_k": 1,
        "b_stride": 1,
        "i_stride_r": d_inner * (taps - 1),
        "i_stride_d": taps - 1,
        "i_stride_k": 1,
        "K": taps,
        "BLOCK_D": launch.block_d,
        "UNROLL": launch.unroll,
        "HAS_BIAS": True,
        "HAS_STATE": every,
        "PACKED": every,
        "SILU": True,
        "REVERSE": every,
    }

"""Triton kernels of `causal_conv1d`, forward and backward.

One program takes one block of channels (across lanes) through one chunk of steps in scan order, with the
d_conv weights, the last d_conv inputs and, backward, the last d_conv gradients in registers: every input is
read once. No chunk crosses the border of a sequence, so the inner loop knows nothing of packing; going
backwards in time is a negative stride. A thread's loads for UNROLL steps are issued before the first of them
is used.

Within a sequence, s counts steps in scan order; inputs at s = -(d_conv - 1) ... -1 are the initial state.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.sequences import Sequences

MAX_D_CONV = 16
UNROLL = 4


@triton.jit
def _chunk(
    cu_seqlens, chunk_start, chunk_seq, length, n_chunks, chunk, BLOCK_T: tl.constexpr, PACKED: tl.constexpr
):
    """Of chunk `chunk` (int64): its row, and its sequence's first step in time, length, and first step s0."""
    if PACKED:
        row = tl.load(chunk_seq + chunk)
        first = tl.load(cu_seqlens + row)
        n = tl.load(cu_seqlens + row + 1) - first
        s0 = tl.load(chunk_start + chunk) - first
    else:
        row = chunk // n_chunks
        first = chunk * 0
        n = first + length
        s0 = (chunk % n_chunks) * BLOCK_T
    return row, first, n, s0


@triton.jit
def _window(x_scan, stride_s, state, d, d_mask, s, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """The K inputs s - K ... s - 1 in fp32 (the first of them unread), from x or from `state` where before
    0.
    """
    window = (tl.zeros_like(d_mask).to(tl.float32),)
    for i in tl.static_range(K - 1):
        at = s - (K - 1) + i
        value = tl.load(x_scan + at * stride_s, mask=d_mask & (at >= 0), other=0.0).to(tl.float32)
        if HAS_STATE:
            old = tl.load(
                state[0] + d * state[1] + (K - 1 + at) * state[2], mask=d_mask & (at < 0), other=0.0
            )
            value += old.to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def _forward_kernel(
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
    x_stride_b,
    x_stride_l,
    x_stride_d,
    w_stride_d,
    w_stride_k,
    b_stride,
    i_stride_r,
    i_stride_d,
    i_stride_k,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
):
    blocks_d = tl.cdiv(d_inner, BLOCK_D)
    chunk = (tl.program_id(0) // blocks_d).to(tl.int64)
    d = ((tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    d_mask = d < d_inner
    row, first, n, s0 = _chunk(cu_seqlens, chunk_start, chunk_seq, length, n_chunks, chunk, BLOCK_T, PACKED)
    s1 = tl.minimum(s0 + BLOCK_T, n)
    x_scan = x + d * x_stride_d
    out_scan = out + d
    if not PACKED:
        x_scan += row * x_stride_b
        out_scan += row * length * d_inner
    # x_scan + s * stride is step s in scan order.
    x_step = x_stride_l
    out_step = d_inner
    if REVERSE:
        first = first + n - 1
        x_step = -x_step
        out_step = -out_step
    x_scan += first * x_stride_l
    out_scan += first * d_inner

    taps = ()
    for j in tl.static_range(K):
        taps = taps + (
            tl.load(weight + d * w_stride_d + j * w_stride_k, mask=d_mask, other=0.0).to(tl.float32),
        )
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d * b_stride, mask=d_mask, other=0.0).to(tl.float32)
    state = (initial_state + row * i_stride_r, i_stride_d, i_stride_k)
    window = _window(x_scan, x_step, state, d, d_mask, s0, K, HAS_STATE)

    s = s0
    while s < s1:
        rows = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (tl.load(x_scan + (s + u) * x_step, mask=d_mask & (s + u < s1), other=0.0),)
        for u in tl.static_range(UNROLL):
            window = window[1:] + (rows[u].to(tl.float32),)
            y = shift
            for j in tl.static_range(K):
                y += window[j] * taps[j]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out_scan + (s + u) * out_step, y.to(out.dtype.element_ty), mask=d_mask & (s + u < s1))
        s += UNROLL

    if s1 == n:
        # The last K - 1 inputs, read again: the window has run past them where the unrolled loop overshot.
        final = _window(x_scan, x_step, state, d, d_mask, n, K, HAS_STATE)
        for i in tl.static_range(K - 1):
            at = final_state + (row * d_inner + d) * (K - 1) + i
            tl.store(at, final[i + 1].to(final_state.dtype.element_ty), mask=d_mask)


@triton.jit
def _backward_kernel(
    dout,  # (batch, length, d_inner), any strides
    dfinal,  # (rows, d_inner, K - 1), any strides
    x,  # (batch, length, d_inner), any strides
    weight,  # (d_inner, K)
    bias,  # (d_inner,)
    initial_state,  # (rows, d_inner, K - 1), any strides
    dx,  # (batch, length, d_inner), contiguous
    partial,  # (chunks, K + 1, d_inner) fp32: of each chunk the gradients of the taps and of the bias
    dinitial,  # (rows, d_inner, K - 1), contiguous
    cu_seqlens,
    chunk_start,
    chunk_seq,
    length,
    d_inner,
    n_chunks,
    g_stride_b,
    g_stride_l,
    g_stride_d,
    f_stride_r,
    f_stride_d,
    f_stride_k,
    x_stride_b,
    x_stride_l,
    x_stride_d,
    w_stride_d,
    w_stride_k,
    b_stride,
    i_stride_r,
    i_stride_d,
    i_stride_k,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
):
    blocks_d = tl.cdiv(d_inner, BLOCK_D)
    chunk = (tl.program_id(0) // blocks_d).to(tl.int64)
    d = ((tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    d_mask = d < d_inner
    row, first, n, s0 = _chunk(cu_seqlens, chunk_start, chunk_seq, length, n_chunks, chunk, BLOCK_T, PACKED)
    s1 = tl.minimum(s0 + BLOCK_T, n)
    x_scan = x + d * x_stride_d
    g_scan = dout + d * g_stride_d
    dx_scan = dx + d
    if not PACKED:
        x_scan += row * x_stride_b
        g_scan += row * g_stride_b
        dx_scan += row * length * d_inner
    x_step = x_stride_l
    g_step = g_stride_l
    dx_step = d_inner
    if REVERSE:
        first = first + n - 1
        x_step = -x_step
        g_step = -g_step
        dx_step = -dx_step
    x_scan += first * x_stride_l
    g_scan += first * g_stride_l
    dx_scan += first * d_inner

    zero = tl.zeros((BLOCK_D,), tl.float32)
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (
            tl.load(weight + d * w_stride_d + j * w_stride_k, mask=d_mask, other=0.0).to(tl.float32),
        )
    shift = zero
    if HAS_BIAS:
        shift = tl.load(bias + d * b_stride, mask=d_mask, other=0.0).to(tl.float32)
    state = (initial_state + row * i_stride_r, i_stride_d, i_stride_k)
    window = _window(x_scan, x_step, state, d, d_mask, s0, K, HAS_STATE)

    # grads holds dL/dy at s - K + 1 ... s, y being the sum before SiLU. With them the gradient of the input
    # at e = s - K + 1 is complete, so the loop runs K - 1 steps past the chunk, and those before s0 are
    # another's.
    grads = ()
    dtaps = ()
    for _ in tl.static_range(K):
        grads = grads + (zero,)
        dtaps = dtaps + (zero,)
    dshift = zero
    s = s0
    while s < s1 + K - 1:
        rows = ()
        upstream = ()
        for u in tl.static_range(UNROLL):
            inside = d_mask & (s + u < n) & (s + u < s1 + K - 1)
            rows = rows + (tl.load(x_scan + (s + u) * x_step, mask=inside, other=0.0),)
            upstream = upstream + (tl.load(g_scan + (s + u) * g_step, mask=inside, other=0.0),)
        for u in tl.static_range(UNROLL):
            window = window[1:] + (rows[u].to(tl.float32),)
            g = upstream[u].to(tl.float32)
            if SILU:
                y = shift
                for j in tl.static_range(K):
                    y += window[j] * taps[j]
                sigmoid = 1.0 / (1.0 + tl.exp(-y))
                g *= sigmoid * (1.0 + y * (1.0 - sigmoid))
            grads = grads[1:] + (g,)
            own = tl.where(s + u < s1, g, 0.0)
            dshift += own
            sums = ()
            for j in tl.static_range(K):
                sums = sums + (dtaps[j] + own * window[j],)
            dtaps = sums

            e = s + u - (K - 1)
            value = zero
            for j in tl.static_range(K):
                value += grads[j] * taps[K - 1 - j]
            if HAS_DFINAL:  # noqa: SIM102 - a constexpr apart from a run-time condition
                if (e >= n - (K - 1)) & (e < n):
                    # This input is kept in the final state.
                    at = dfinal + row * f_stride_r + d * f_stride_d + (e - n + K - 1) * f_stride_k
                    value += tl.load(at, mask=d_mask, other=0.0).to(tl.float32)
            tl.store(dx_scan + e * dx_step, value.to(dx.dtype.element_ty), mask=d_mask & (e >= s0) & (e < s1))
            if HAS_STATE:  # noqa: SIM102
                if e < 0:
                    at = dinitial + (row * d_inner + d) * (K - 1) + (e + K - 1)
                    tl.store(at, value.to(dinitial.dtype.element_ty), mask=d_mask)
        s += UNROLL

    at = partial + chunk * (K + 1) * d_inner + d
    for j in tl.static_range(K):
        tl.store(at + j * d_inner, dtaps[j], mask=d_mask)
    tl.store(at + K * d_inner, dshift, mask=d_mask)


def block_t(steps: int) -> int:
    """Steps a program takes: long enough that re-read borders cost little, short enough to fill a GPU."""
    return 32 if steps <= 4096 else 64 if steps <= 32768 else 128


def _blocks(d_inner: int, taps: int) -> tuple[int, int]:
    """Channels a program, and warps: four channels a thread, or two where the windows of more would spill."""
    most = 128 if taps <= 4 else 64
    return min(most, max(16, triton.next_power_of_2(d_inner))), 1


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape[1] > MAX_D_CONV:
        raise ValueError(
            f"causal_conv1d: weight has d_conv {weight.shape[1]}, expected at most {MAX_D_CONV} on backend "
            "'triton'; backend 'torch' takes any"
        )


def _plan(x: Tensor, seqs: Sequences | None) -> tuple[int, int, tuple[Tensor, Tensor, Tensor], int]:
    """(steps a chunk, chunks in all, (cu_seqlens, chunk starts, chunk sequences), chunks a row)."""
    batch, length = x.shape[:2]
    steps = block_t(batch * length)
    if seqs is None:
        per_row = triton.cdiv(length, steps)
        return steps, batch * per_row, (x, x, x), per_row
    table = seqs.chunks(steps)
    return steps, table.n_chunks, (seqs.cu_seqlens, table.start, table.seq), table.n_chunks


def _rows(x: Tensor, seqs: Sequences | None) -> int:
    return x.shape[0] if seqs is None else seqs.n


def _has_empty(x: Tensor, seqs: Sequences | None) -> bool:
    return x.shape[1] == 0 or (seqs is not None and 0 in seqs.lengths)


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, d_inner) and final state (rows, d_inner, d_conv - 1), contiguous, in x's dtype.

    Arguments as `causal_conv1d` has checked them. Raises ValueError above `MAX_D_CONV` taps.
    """
    _check(x, weight)
    d_inner, taps = weight.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = x.new_empty(_rows(x, seqs), d_inner, taps - 1)
    if _has_empty(x, seqs):
        # Rows without a step run no program: they hand their state through.
        final.zero_() if initial_state is None else final.copy_(initial_state)
    steps, chunks, tables, per_row = _plan(x, seqs)
    block_d, warps = _blocks(d_inner, taps)
    programs = chunks * triton.cdiv(d_inner, block_d)
    if programs == 0:
        return out, final
    state = x if initial_state is None else initial_state
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            x,
            weight,
            x if bias is None else bias,
            state,
            out,
            final,
            *tables,
            x.shape[1],
            d_inner,
            per_row,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            *state.stride(),
            K=taps,
            BLOCK_T=steps,
            BLOCK_D=block_d,
            UNROLL=UNROLL,
            HAS_BIAS=bias is not None,
            HAS_STATE=initial_state is not None and taps > 1,
            PACKED=seqs is not None,
            SILU=silu,
            REVERSE=reverse,
            num_warps=warps,
        )
    return out, final


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None where the argument is), in the arguments' dtypes.

    dout: (batch, length, d_inner). dfinal_state: (rows, d_inner, d_conv - 1) or None for zeros. The gradients
    of weight and bias are summed from one partial sum a chunk, in a fixed order: two runs agree to the bit.
    """
    _check(x, weight)
    d_inner, taps = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    if dinitial is not None and _has_empty(x, seqs):
        dinitial.zero_() if dfinal_state is None else dinitial.copy_(dfinal_state)
    steps, chunks, tables, per_row = _plan(x, seqs)
    block_d, warps = _blocks(d_inner, taps)
    programs = chunks * triton.cdiv(d_inner, block_d)
    partial = torch.empty(chunks, taps + 1, d_inner, dtype=torch.float32, device=x.device)
    state = x if initial_state is None else initial_state
    final = x if dfinal_state is None else dfinal_state
    if programs > 0:
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                dout,
                final,
                x,
                weight,
                x if bias is None else bias,
                state,
                dx,
                partial,
                x if dinitial is None else dinitial,
                *tables,
                x.shape[1],
                d_inner,
                per_row,
                *dout.stride(),
                *final.stride(),
                *x.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                *state.stride(),
                K=taps,
                BLOCK_T=steps,
                BLOCK_D=block_d,
                UNROLL=UNROLL,
                HAS_BIAS=bias is not None,
                HAS_STATE=initial_state is not None and taps > 1,
                HAS_DFINAL=dfinal_state is not None and taps > 1,
                PACKED=seqs is not None,
                SILU=silu,
                REVERSE=reverse,
                num_warps=warps,
            )
    sums = partial.sum(0)
    # Copies: the outputs of a custom op share no memory.
    dweight = sums[:taps].t().to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    dbias = None if bias is None else sums[taps].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dinitial


def aot_cases() -> list[AotCase]:
    """The shipped shapes of program: each block of channels, forward and backward, plain and with
    everything.
    """
    shapes = [(4, every) for every in (False, True)] + [(8, True), (MAX_D_CONV, True)]
    cases = []
    for (taps, every), dtype in itertools.product(shapes, ("fp32", "bf16")):
        config = f"d_conv {taps} {dtype}{' packed reverse state' if every else ''}"
        forward, backward = _aot_arguments(taps, dtype, every)
        warps = _blocks(forward["d_inner"], taps)[1]
        cases.append(AotCase(_forward_kernel, config, forward, num_warps=warps))
        cases.append(AotCase(_backward_kernel, config, backward, num_warps=warps))
    return cases


def _aot_arguments(taps: int, dtype: str, every: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of both kernels by name, as a launch on contiguous inputs gives them; `every` turns on
    packing, the state and reverse."""
    length, d_inner = 2048, 1536
    steps = block_t(length)
    given = dict.fromkeys(("x", "initial_state"), "*" + dtype) | dict.fromkeys(("weight", "bias"), "*fp32")
    given |= dict.fromkeys(("cu_seqlens", "chunk_start", "chunk_seq"), "*i64" if every else "*" + dtype)
    shared: dict[str, Any] = {
        **given,
        "length": length,
        "d_inner": d_inner,
        "n_chunks": triton.cdiv(length, steps),
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
        "BLOCK_T": steps,
        "BLOCK_D": _blocks(d_inner, taps)[0],
        "UNROLL": UNROLL,
        "HAS_BIAS": True,
        "HAS_STATE": every,
        "PACKED": every,
        "SILU": True,
        "REVERSE": every,
    }
    forward = shared | dict.fromkeys(("out", "final_state"), "*" + dtype)
    backward = (
        shared
        | dict.fromkeys(("dout", "dfinal", "dx", "dinitial"), "*" + dtype)
        | {
            "partial": "*fp32",
            "g_stride_b": length * d_inner,
            "g_stride_l": d_inner,
            "g_stride_d": 1,
            "f_stride_r": d_inner * (taps - 1),
            "f_stride_d": taps - 1,
            "f_stride_k": 1,
            "HAS_DFINAL": every,
        }
    )
    return forward, backward

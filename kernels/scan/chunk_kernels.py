"""Kernels of the Triton selective scan that take every chunk of time alone, both ways.

What a chunk entered with zero does: the state that it ends with, and, against the direction of the scan, what
it adds to the gradient of the state entering it; with each its sum of dt. `triton_fwd.py` and `triton_bwd.py`
say what for. A program is one warp and its tile of states [BLOCK_N, BLOCK_D], as in `output_kernels.py`.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssm_modal.kernels.scan.decays import decays
from ssm_modal.kernels.scan.prefetch import copied_row, copies_wait, copy_block, load_rows
from ssm_modal.kernels.scan.staging import STAGED_STRIDES, stage_base, stage_rows, stage_wait, states_row
from ssm_modal.kernels.scan.triton_common import (
    EXTENTS,
    LOG2E,
    again,
    channel_block,
    chunk_range,
    first_channel,
    row_offset,
    state_block,
    state_tile,
    time_step,
    trips,
)
from ssm_modal.kernels.triton_math import sigmoid


@triton.jit(do_not_specialize=EXTENTS, do_not_specialize_on_alignment=STAGED_STRIDES)
def chunk_state_kernel(
    u_ptr,  # (batch, length, d_inner)
    delta_ptr,  # (batch, length, d_inner)
    a_ptr,  # (d_state, d_inner) fp32
    b_ptr,  # (batch, length, groups, d_state)
    bias_ptr,  # (d_inner,) fp32 or None
    states_ptr,  # out: (chunks, d_state, d_inner) fp32
    sums_ptr,  # out: (chunks, d_inner) fp32
    start_ptr,  # packed: (chunks,) int64
    end_ptr,
    u_batch,
    u_time,
    delta_batch,
    delta_time,
    b_batch,
    b_time,
    b_group,
    length,
    n_chunks,
    d_inner,
    d_state,
    group_channels,
    blocks_per_group,
    blocks,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGE: tl.constexpr,
    STEPS: tl.constexpr,
    RESERVE: tl.constexpr,
    BRING: tl.constexpr,
    BROUGHT: tl.constexpr,
    READ: tl.constexpr,
    READ_CONSTRAINTS: tl.constexpr,
    ROW_READ: tl.constexpr,
    ROW_COPY: tl.constexpr,
    ROW_PIECE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DECAY: tl.constexpr,
    DECAY_CONSTRAINTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_D: tl.constexpr,
    FULL_N: tl.constexpr,
):
    """One program a chunk and channel block."""
    pid = tl.program_id(0)
    group, d, mask_d = channel_block(pid % blocks, group_channels, blocks_per_group, BLOCK_D, FULL_D)
    row, start, end = chunk_range(pid // blocks, start_ptr, end_ptr, length, n_chunks, CHUNK, PACKED)
    chunk = (pid // blocks).to(tl.int64)
    group = group.to(tl.int64)
    n, mask_n = state_block(d_state, BLOCK_N, FULL_N)
    tile = state_tile(n, d, d_inner)
    mask = mask_n[:, None] & mask_d[None, :]
    rate = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2E
    bias = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0)
    count = (end - start).to(tl.int32)
    t = start
    step = 1
    if REVERSE:
        t = end - 1
        step = -1
    u_ptr += row * u_batch + t * u_time
    delta_ptr += row * delta_batch + t * delta_time
    b_ptr += row * b_batch + t * b_time + group * b_group
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # A tile, as the states are: of a row in another layout all that leads to it would be computed once more.
    total = tl.zeros([1, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_D)
    staged = stage_base(RESERVE)
    COPIED: tl.constexpr = ROW_READ is not None
    ROWS: tl.constexpr = STEPS * BLOCK_D * ROW_BYTES
    rows = staged + STAGE * BLOCK_N * 8
    channel = first_channel(pid % blocks, group_channels, blocks_per_group, BLOCK_D)
    if COPIED:
        copy_block(
            rows, u_ptr, u_time, delta_ptr, delta_time, None, 0, None, 0, 0, count, step, channel, WIDE,
            STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
        )  # fmt: skip
    for stage in range(0, trips(count), STAGE):
        stage_rows(
            staged, b_ptr, None, stage, count, step, b_time, 0, d_state, BRING, BROUGHT, WIDE, STAGE, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        for first in range(stage, trips(tl.minimum(stage + STAGE, count)), STEPS):
            here = rows + (first // STEPS % 2) * (2 * ROWS)
            if COPIED:
                ahead = rows + ((first // STEPS + 1) % 2) * (2 * ROWS)
                stage_wait()
                copy_block(
                    ahead, u_ptr, u_time, delta_ptr, delta_time, None, 0, None, 0, first + STEPS, count, step,
                    channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
                )  # fmt: skip
                copies_wait(1)
            else:
                us = load_rows(u_ptr, first, count, step, u_time, d, mask_d, WIDE, STEPS)
                xs = load_rows(delta_ptr, first, count, step, delta_time, d, mask_d, WIDE, STEPS)
            for j in tl.static_range(STEPS):
                if COPIED:
                    u = copied_row(here, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                    x = copied_row(here + ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                else:
                    u = us[j].to(tl.float32)
                    x = xs[j].to(tl.float32)
                at = tl.minimum(first + j, count - 1) * step
                b = states_row(
                    staged, first - stage + j, b_ptr, at, b_time, n, lane, mask_n, READ, READ_CONSTRAINTS,
                    BLOCK_N, BLOCK_D,
                )  # fmt: skip
                dt = time_step(x, bias, first + j < count, SOFTPLUS)
                total += dt[None, :]
                h = decays(rate, dt, DECAY, DECAY_CONSTRAINTS) * h + b * (dt * u)[None, :]
    # Kept over the loops, these addresses would take registers.
    _, d, _ = channel_block(again(pid % blocks), group_channels, blocks_per_group, BLOCK_D, FULL_D)
    tile = state_tile(n, d, again(d_inner))
    tl.store(states_ptr + chunk * d_inner * d_state + tile, h, mask=mask)
    tl.store(sums_ptr + chunk * d_inner + d[None, :], total, mask=mask_d[None, :])


@triton.jit(do_not_specialize=EXTENTS, do_not_specialize_on_alignment=STAGED_STRIDES)
def chunk_grad_kernel(
    dout_ptr,  # (batch, length, d_inner)
    z_ptr,  # (batch, length, d_inner) or None
    y_ptr,  # (batch, length, d_inner), contiguous, or None: what z gates, asking for dy and dz
    delta_ptr,  # (batch, length, d_inner)
    a_ptr,  # (d_state, d_inner) fp32
    c_ptr,  # (batch, length, groups, d_state)
    bias_ptr,  # (d_inner,) fp32 or None
    grads_ptr,  # out: (chunks, d_state, d_inner) fp32
    sums_ptr,  # out: (chunks, d_inner) fp32
    dy_ptr,  # out: as y, or None: the gradient in y
    dz_ptr,  # out: as y, or None
    start_ptr,  # packed: (chunks,) int64
    end_ptr,
    dout_batch,
    dout_time,
    z_batch,
    z_time,
    delta_batch,
    delta_time,
    c_batch,
    c_time,
    c_group,
    length,
    n_chunks,
    d_inner,
    d_state,
    group_channels,
    blocks_per_group,
    blocks,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGE: tl.constexpr,
    STEPS: tl.constexpr,
    RESERVE: tl.constexpr,
    BRING: tl.constexpr,
    BROUGHT: tl.constexpr,
    READ: tl.constexpr,
    READ_CONSTRAINTS: tl.constexpr,
    ROW_READ: tl.constexpr,
    ROW_COPY: tl.constexpr,
    ROW_PIECE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DECAY: tl.constexpr,
    DECAY_CONSTRAINTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_D: tl.constexpr,
    FULL_N: tl.constexpr,
):
    """One program a chunk and channel block; steps are walked against the direction of the scan."""
    pid = tl.program_id(0)
    group, d, mask_d = channel_block(pid % blocks, group_channels, blocks_per_group, BLOCK_D, FULL_D)
    row, start, end = chunk_range(pid // blocks, start_ptr, end_ptr, length, n_chunks, CHUNK, PACKED)
    chunk = (pid // blocks).to(tl.int64)
    group = group.to(tl.int64)
    n, mask_n = state_block(d_state, BLOCK_N, FULL_N)
    mask = mask_n[:, None] & mask_d[None, :]
    tile = state_tile(n, d, d_inner)
    rate = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2E
    bias = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0)
    count = (end - start).to(tl.int32)
    t = end - 1
    step = -1
    if REVERSE:
        t = start
        step = 1
    dout_ptr += row * dout_batch + t * dout_time
    delta_ptr += row * delta_batch + t * delta_time
    c_ptr += row * c_batch + t * c_time + group * c_group
    if z_ptr is not None:
        z_ptr += row * z_batch + t * z_time
    if y_ptr is not None:
        inside = (row * length + t) * d_inner
        y_ptr += inside
        dy_ptr += inside
        dz_ptr += inside
        BUFFER: tl.constexpr = 4
    else:
        BUFFER: tl.constexpr = 3

    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # A tile, as the states are: of a row in another layout all that leads to it would be computed once more.
    total = tl.zeros([1, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_D)
    staged = stage_base(RESERVE)
    COPIED: tl.constexpr = ROW_READ is not None
    ROWS: tl.constexpr = STEPS * BLOCK_D * ROW_BYTES
    rows = staged + STAGE * BLOCK_N * 8
    channel = first_channel(pid % blocks, group_channels, blocks_per_group, BLOCK_D)
    if COPIED:
        copy_block(
            rows, dout_ptr, dout_time, delta_ptr, delta_time, z_ptr, z_time, y_ptr, d_inner, 0, count, step,
            channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
        )  # fmt: skip
    for stage in range(0, trips(count), STAGE):
        stage_rows(
            staged, c_ptr, None, stage, count, step, c_time, 0, d_state, BRING, BROUGHT, WIDE, STAGE, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        for first in range(stage, trips(tl.minimum(stage + STAGE, count)), STEPS):
            here = rows + (first // STEPS % 2) * (BUFFER * ROWS)
            if COPIED:
                ahead = rows + ((first // STEPS + 1) % 2) * (BUFFER * ROWS)
                stage_wait()
                copy_block(
                    ahead, dout_ptr, dout_time, delta_ptr, delta_time, z_ptr, z_time, y_ptr, d_inner,
                    first + STEPS, count, step, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
                )  # fmt: skip
                copies_wait(1)
            else:
                douts = load_rows(dout_ptr, first, count, step, dout_time, d, mask_d, WIDE, STEPS)
                xs = load_rows(delta_ptr, first, count, step, delta_time, d, mask_d, WIDE, STEPS)
                if z_ptr is not None:
                    zs = load_rows(z_ptr, first, count, step, z_time, d, mask_d, WIDE, STEPS)
                if y_ptr is not None:
                    ys = load_rows(y_ptr, first, count, step, d_inner, d, mask_d, WIDE, STEPS)
            for j in tl.static_range(STEPS):
                if COPIED:
                    dy = copied_row(here, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                    x = copied_row(here + ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                else:
                    dy = douts[j].to(tl.float32)
                    x = xs[j].to(tl.float32)
                at = tl.minimum(first + j, count - 1) * step
                c = states_row(
                    staged, first - stage + j, c_ptr, at, c_time, n, lane, mask_n, READ, READ_CONSTRAINTS,
                    BLOCK_N, BLOCK_D,
                )  # fmt: skip
                # A step beyond the end adds nothing, and its dt is 0, so it changes nothing.
                dy = tl.where(first + j < count, dy, 0.0)
                dt = time_step(x, bias, first + j < count, SOFTPLUS)
                if z_ptr is not None:
                    if COPIED:
                        z = copied_row(here + 2 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                    else:
                        z = zs[j].to(tl.float32)
                    gate = sigmoid(z)
                    if y_ptr is not None:
                        if COPIED:
                            y = copied_row(here + 3 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        else:
                            y = ys[j].to(tl.float32)
                        dz = dy * y * (gate * (1.0 + z * (1.0 - gate)))
                    dy *= z * gate
                    if y_ptr is not None:
                        to = row_offset((first + j) * step, d_inner, d, WIDE)
                        mask_j = mask_d & (first + j < count)
                        tl.store(dz_ptr + to, dz.to(dz_ptr.dtype.element_ty), mask=mask_j)
                        tl.store(dy_ptr + to, dy.to(dy_ptr.dtype.element_ty), mask=mask_j)
                total += dt[None, :]
                g = decays(rate, dt, DECAY, DECAY_CONSTRAINTS) * (g + c * dy[None, :])
    # Kept over the loops, the addresses of the tile would take registers.
    _, d, mask_d = channel_block(again(pid % blocks), group_channels, blocks_per_group, BLOCK_D, FULL_D)
    chunk = again(pid // blocks).to(tl.int64)
    tile = state_tile(n, d, again(d_inner))
    tl.store(grads_ptr + chunk * d_inner * d_state + tile, g, mask=mask_n[:, None] & mask_d[None, :])
    tl.store(sums_ptr + chunk * d_inner + d[None, :], total, mask=mask_d[None, :])

"""The kernel of the Triton forward of the selective scan that gives outputs; `triton_fwd.py` launches it.

A program is one warp and its tile of states [BLOCK_N, BLOCK_D], channels across lanes: up to d_state 16 a
thread holds all states of its channel, so that a time step reads one coalesced row of each input and the sum
over states needs no exchange; beyond that, tiles have fewer channels and lanes share one.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssm_modal.kernels.scan.decays import decays
from ssm_modal.kernels.scan.prefetch import (
    copied_row,
    copies_wait,
    copy_block,
    load_rows,
)
from ssm_modal.kernels.scan.staging import STAGED_STRIDES, stage_base, stage_rows, stage_wait, states_row
from ssm_modal.kernels.scan.triton_common import (
    EXTENTS,
    LOG2E,
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
def output_kernel(
    u_ptr,  # (batch, length, d_inner)
    delta_ptr,  # (batch, length, d_inner)
    a_ptr,  # (d_state, d_inner) fp32
    b_ptr,  # (batch, length, groups, d_state)
    c_ptr,  # (batch, length, groups, d_state)
    skip_ptr,  # D: (d_inner,) fp32 or None
    z_ptr,  # (batch, length, d_inner) or None
    bias_ptr,  # (d_inner,) fp32 or None
    added_ptr,  # as out, or None: added to y, before the gate; may be `out_ptr` or `y_ptr`
    y_ptr,  # out: as out, or None: y before the gate
    out_ptr,  # out: (batch, length, d_inner)
    states_ptr,  # (chunks, d_state, d_inner) fp32: entering states, read; written when SERIAL
    initial_ptr,  # SERIAL: (sequences, d_state, d_inner) fp32 or None
    final_ptr,  # SERIAL: out, (sequences, d_state, d_inner) fp32
    start_ptr,  # packed: (chunks,) int64; SERIAL: (sequences,) int64
    end_ptr,
    first_ptr,  # packed and SERIAL: (sequences,) int64, first chunk of each sequence
    u_batch,
    u_time,
    delta_batch,
    delta_time,
    b_batch,
    b_time,
    b_group,
    c_batch,
    c_time,
    c_group,
    z_batch,
    z_time,
    out_batch,
    out_time,
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
    SERIAL: tl.constexpr,
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
    """One program a chunk (SERIAL: a sequence) and channel block."""
    pid = tl.program_id(0)
    item = (pid // blocks).to(tl.int64)
    group, d, mask_d = channel_block(pid % blocks, group_channels, blocks_per_group, BLOCK_D, FULL_D)
    group = group.to(tl.int64)
    n, mask_n = state_block(d_state, BLOCK_N, FULL_N)
    tile = state_tile(n, d, d_inner)
    mask = mask_n[:, None] & mask_d[None, :]
    size = d_inner.to(tl.int64) * d_state
    if SERIAL:
        row = item
        start = item * 0
        end = start + length
        chunk = item * n_chunks
        if PACKED:
            row = item * 0
            start = tl.load(start_ptr + item)
            end = tl.load(end_ptr + item)
            chunk = tl.load(first_ptr + item)
    else:
        row, start, end = chunk_range(pid // blocks, start_ptr, end_ptr, length, n_chunks, CHUNK, PACKED)
        chunk = item
    rate = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2E
    bias = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0)
    skip = tl.zeros([BLOCK_D], tl.float32)
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + d, mask=mask_d, other=0.0)
    u_ptr += row * u_batch
    delta_ptr += row * delta_batch
    b_ptr += row * b_batch + group * b_group
    c_ptr += row * c_batch + group * c_group
    out_ptr += row * out_batch
    if added_ptr is not None:
        added_ptr += row * out_batch
    if y_ptr is not None:
        y_ptr += row * out_batch
    if z_ptr is not None:
        z_ptr += row * z_batch

    lane = tl.arange(0, BLOCK_D)
    staged_b = stage_base(RESERVE)
    staged_c = staged_b + STAGE * BLOCK_N * 4
    COPIED: tl.constexpr = ROW_READ is not None
    ROWS: tl.constexpr = STEPS * BLOCK_D * ROW_BYTES
    rows = staged_b + STAGE * BLOCK_N * 8
    if added_ptr is not None:
        BUFFER: tl.constexpr = 4 * ROWS
    else:
        BUFFER: tl.constexpr = 3 * ROWS
    channel = first_channel(pid % blocks, group_channels, blocks_per_group, BLOCK_D)
    own_chunks = item * 0 + 1
    if SERIAL:
        own_chunks = (end - start + CHUNK - 1) // CHUNK
        h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if initial_ptr is not None:
            h = tl.load(initial_ptr + item * size + tile, mask=mask, other=0.0)
    else:
        h = tl.load(states_ptr + chunk * size + tile, mask=mask, other=0.0)
    step = 1
    if REVERSE:
        step = -1
    for k in range(trips(own_chunks)):
        chunk_start = start
        chunk_end = end
        if SERIAL:
            index = k
            if REVERSE:
                index = own_chunks - 1 - k
            chunk_start = start + index * CHUNK
            chunk_end = tl.minimum(chunk_start + CHUNK, end)
            tl.store(states_ptr + (chunk + index) * size + tile, h, mask=mask)
        count = (chunk_end - chunk_start).to(tl.int32)
        t = chunk_start
        if REVERSE:
            t = chunk_end - 1
        u_row = u_ptr + t * u_time
        delta_row = delta_ptr + t * delta_time
        b_row = b_ptr + t * b_time
        c_row = c_ptr + t * c_time
        out_row = out_ptr + t * out_time
        z_row = z_ptr
        if z_ptr is not None:
            z_row += t * z_time
        y_row = y_ptr
        if y_ptr is not None:
            y_row += t * out_time
        added_row = added_ptr
        if added_ptr is not None:
            added_row += t * out_time
        if COPIED:
            copy_block(
                rows, u_row, u_time, delta_row, delta_time, z_row, z_time, added_row, out_time, 0, count,
                step, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
            )  # fmt: skip
        for stage in range(0, trips(count), STAGE):
            stage_rows(
                staged_b, b_row, c_row, stage, count, step, b_time, c_time, d_state, BRING, BROUGHT, WIDE,
                STAGE, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            for first in range(stage, trips(tl.minimum(stage + STAGE, count)), STEPS):
                here = rows + (first // STEPS % 2) * BUFFER
                if COPIED:
                    ahead = rows + ((first // STEPS + 1) % 2) * BUFFER
                    stage_wait()
                    copy_block(
                        ahead, u_row, u_time, delta_row, delta_time, z_row, z_time, added_row, out_time,
                        first + STEPS, count, step, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE,
                        ROW_BYTES,
                    )  # fmt: skip
                    copies_wait(1)
                else:
                    us = load_rows(u_row, first, count, step, u_time, d, mask_d, WIDE, STEPS)
                    xs = load_rows(delta_row, first, count, step, delta_time, d, mask_d, WIDE, STEPS)
                    if z_ptr is not None:
                        zs = load_rows(z_row, first, count, step, z_time, d, mask_d, WIDE, STEPS)
                    if added_ptr is not None:
                        more = load_rows(added_row, first, count, step, out_time, d, mask_d, WIDE, STEPS)
                # Outputs wait for the last step: no load may pass a store.
                ys = ()
                outs = ()
                for j in tl.static_range(STEPS):
                    if COPIED:
                        u = copied_row(here, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        x = copied_row(here + ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                    else:
                        u = us[j].to(tl.float32)
                        x = xs[j].to(tl.float32)
                    at = tl.minimum(first + j, count - 1) * step
                    b = states_row(
                        staged_b, first - stage + j, b_row, at, b_time, n, lane, mask_n, READ,
                        READ_CONSTRAINTS, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                    c = states_row(
                        staged_c, first - stage + j, c_row, at, c_time, n, lane, mask_n, READ,
                        READ_CONSTRAINTS, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                    dt = time_step(x, bias, first + j < count, SOFTPLUS)
                    h = decays(rate, dt, DECAY, DECAY_CONSTRAINTS) * h + b * (dt * u)[None, :]
                    y = tl.sum(h * c, axis=0) + skip * u
                    if added_ptr is not None:
                        if COPIED:
                            y += copied_row(here + 3 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        else:
                            y += more[j].to(tl.float32)
                    if y_ptr is not None:
                        ys += (y,)
                    if z_ptr is not None:
                        if COPIED:
                            z = copied_row(here + 2 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        else:
                            z = zs[j].to(tl.float32)
                        y *= z * sigmoid(z)
                    outs += (y,)
                for j in tl.static_range(STEPS):
                    place = row_offset((first + j) * step, out_time, d, WIDE)
                    mask_j = mask_d & (first + j < count)
                    if y_ptr is not None:
                        tl.store(y_row + place, ys[j].to(y_ptr.dtype.element_ty), mask=mask_j)
                    tl.store(out_row + place, outs[j].to(out_ptr.dtype.element_ty), mask=mask_j)
        if COPIED:
            copies_wait(0)
    if SERIAL:
        tl.store(final_ptr + item * size + tile, h, mask=mask)

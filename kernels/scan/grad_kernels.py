"""The kernel of the Triton backward of the selective scan that gives gradients: see `triton_bwd.py`."""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssm_modal.kernels.scan.channel_sum import SHARED_APART, add_channels, flush_channels, sum_place
from ssm_modal.kernels.scan.keeping import (
    fetch_tile,
    keep_place,
    keep_tile,
    keep_times,
    leave_tile,
    take_row,
    take_tile,
    tiles_left,
)
from ssm_modal.kernels.scan.prefetch import (
    copied_row,
    copies_made,
    copies_wait,
    copy_block,
)
from ssm_modal.kernels.scan.staging import STAGED_STRIDES, stage_base, stage_rows, stage_wait, states_row
from ssm_modal.kernels.scan.triton_common import (
    EXTENTS,
    LN2,
    LOG2E,
    again,
    channel_block,
    chunk_range,
    first_channel,
    load_row,
    row_offset,
    state_block,
    state_tile,
    time_step,
    trips,
)
from ssm_modal.kernels.triton_math import sigmoid


@triton.jit(do_not_specialize=EXTENTS, do_not_specialize_on_alignment=STAGED_STRIDES)
def grad_kernel(
    dout_ptr,  # (batch, length, d_inner)
    u_ptr,  # (batch, length, d_inner)
    delta_ptr,  # (batch, length, d_inner)
    a_ptr,  # (d_state, d_inner) fp32
    b_ptr,  # (batch, length, groups, d_state)
    c_ptr,  # (batch, length, groups, d_state)
    skip_ptr,  # D: (d_inner,) fp32 or None
    z_ptr,  # (batch, length, d_inner) or None
    bias_ptr,  # (d_inner,) fp32 or None
    states_ptr,  # (chunks, d_state, d_inner) fp32: state entering each chunk
    grads_ptr,  # (chunks, d_state, d_inner) fp32: gradient of the state leaving a chunk; becomes its dA
    added_ptr,  # (batch, length, d_inner), contiguous, or None: added to du; may be `du_ptr`; None beside z
    scratch_ptr,  # (programs, subs, BLOCK_N, BLOCK_D) fp32, a program's own; without KEPT (programs, subs
    # + STEPS, ...)
    du_ptr,  # out: (batch, length, d_inner), contiguous
    ddelta_ptr,  # out: (batch, length, d_inner), contiguous
    sums_ptr,  # out: (partials, batch, length, groups, 2, states) fp32, zeros: dB and dC; states: d_state
    # rounded up, to 4 at least
    dskip_ptr,  # out: (chunks, d_inner) fp32 or None
    dz_ptr,  # out: (batch, length, d_inner), contiguous, or None
    dbias_ptr,  # out: (chunks, d_inner) fp32 or None
    start_ptr,  # packed: (chunks,) int64
    end_ptr,
    dout_batch,
    dout_time,
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
    batch,
    length,
    n_chunks,
    d_inner,
    d_state,
    groups,
    group_channels,
    blocks_per_group,
    blocks_per_split,
    splits,
    partials,
    subs,
    items,
    programs,
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
    KEPT: tl.constexpr,
    KEEP: tl.constexpr,
    KEEP_CONSTRAINTS: tl.constexpr,
    TAKE: tl.constexpr,
    TAKE_CONSTRAINTS: tl.constexpr,
    LEAVE: tl.constexpr,
    LEAVE_CONSTRAINTS: tl.constexpr,
    FETCH: tl.constexpr,
    FETCH_CONSTRAINTS: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_CONSTRAINTS: tl.constexpr,
    ADD: tl.constexpr,
    ADD_CONSTRAINTS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_D: tl.constexpr,
    FULL_N: tl.constexpr,
):
    """An item is a chunk, group and share of the group's channel blocks; a program takes every so many items.

    As many programs as run at a time: their scratch stays in the second-level cache.
    """
    pid = tl.program_id(0)
    padded_state: tl.constexpr = BLOCK_N if BLOCK_N >= 4 else 4
    n, mask_n = state_block(d_state, BLOCK_N, FULL_N)
    size = d_inner.to(tl.int64) * d_state
    lane = tl.arange(0, BLOCK_D)
    # The scratch is aligned, but the rows of a tile must lie across lanes as they do everywhere else.
    local = tl.multiple_of(n[:, None] * BLOCK_D + lane[None, :], [1, 1])
    local = tl.max_contiguous(local, [1, 2])
    slots = subs
    if not KEPT:
        slots += STEPS
    scratch_ptr += pid.to(tl.int64) * slots * (BLOCK_D * BLOCK_N)
    place = sum_place(HELD, BLOCK_N, BLOCK_D)
    staged_b = stage_base(RESERVE)
    staged_c = staged_b + STAGE * BLOCK_N * 4
    TILE: tl.constexpr = BLOCK_N * BLOCK_D * 4
    COPIED: tl.constexpr = ROW_READ is not None
    ROWS: tl.constexpr = STEPS * BLOCK_D * ROW_BYTES
    rows = staged_b + STAGE * BLOCK_N * 8
    if KEPT:
        kept = keep_place(rows, n, lane, BLOCK_N, BLOCK_D)
        left = scratch_ptr.to(tl.int64) + keep_place(0, n, lane, BLOCK_N, BLOCK_D)
        rows += STEPS * TILE
        times = rows
        dts = times + lane * 4
        rows += STEPS * BLOCK_D * 4
    shared_sums = rows + 8 * ROWS
    for k in range(trips((items - pid + programs - 1) // programs)):
        item = pid + k * programs
        split = item % splits
        group_index = (item // splits) % groups
        group = group_index.to(tl.int64)
        chunk_index = item // (splits * groups)
        row, start, end = chunk_range(chunk_index, start_ptr, end_ptr, length, n_chunks, CHUNK, PACKED)
        chunk = chunk_index.to(tl.int64)
        count = (end - start).to(tl.int32)
        t0 = start
        step = 1
        if REVERSE:
            t0 = end - 1
            step = -1
        b_row = b_ptr + row * b_batch + t0 * b_time + group * b_group
        c_row = c_ptr + row * c_batch + t0 * c_time + group * c_group
        own_stages = (count + STAGE - 1) // STAGE
        first_block = split * blocks_per_split
        own_blocks = tl.minimum(blocks_per_split, blocks_per_group - first_block)
        for r in range(trips(own_blocks)):
            block = group_index * blocks_per_group + first_block + r
            _, d, mask_d = channel_block(block, group_channels, blocks_per_group, BLOCK_D, FULL_D)
            channel = first_channel(block, group_channels, blocks_per_group, BLOCK_D)
            mask = mask_n[:, None] & mask_d[None, :]
            tile = state_tile(n, d, d_inner)
            rate = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2E
            bias = tl.zeros([BLOCK_D], tl.float32)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0)
            u_row = u_ptr + row * u_batch + t0 * u_time
            delta_row = delta_ptr + row * delta_batch + t0 * delta_time

            # Forward over the chunk: every STEPS-th state into the scratch. The last stage of rows is the
            # first that is needed on the way back: with it comes C.
            h = tl.load(states_ptr + chunk * size + tile, mask=mask, other=0.0)
            if COPIED:
                copy_block(
                    rows, u_row, u_time, delta_row, delta_time, None, 0, None, 0, 0, count, step, channel,
                    WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
                )  # fmt: skip
            for stage in range(0, trips(count), STAGE):
                stage_rows(
                    staged_b, b_row, None, stage, count, step, b_time, 0, d_state, BRING, BROUGHT, WIDE,
                    STAGE, BLOCK_N, BLOCK_D, STAGE,
                )  # fmt: skip
                if stage + STAGE >= count:
                    stage_rows(
                        staged_c, c_row, None, stage, count, step, c_time, 0, d_state, BRING, BROUGHT, WIDE,
                        STAGE, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                for first in range(stage, trips(tl.minimum(stage + STAGE, count)), STEPS):
                    here = rows + (first // STEPS % 2) * (4 * ROWS)
                    if COPIED:
                        ahead = rows + ((first // STEPS + 1) % 2) * (4 * ROWS)
                        stage_wait()
                        copy_block(
                            ahead, u_row, u_time, delta_row, delta_time, None, 0, None, 0, first + STEPS,
                            count, step, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE, ROW_BYTES,
                        )  # fmt: skip
                        copies_wait(1)
                    if KEPT:
                        leave_tile(left + (first // STEPS) * TILE, h, LEAVE, LEAVE_CONSTRAINTS)
                    else:
                        tl.store(scratch_ptr + (first // STEPS) * (BLOCK_D * BLOCK_N) + local, h)
                    if KEPT:
                        keep_times(
                            times, delta_row, here + ROWS, first, count, step, delta_time, d, mask_d, lane,
                            bias, SOFTPLUS, WIDE, STEPS, BLOCK_D, ROW_READ, ROW_BYTES,
                        )  # fmt: skip
                    # Loops over steps stay loops: unrolled, the code would be too long for the instruction
                    # caches.
                    for j in range(trips(tl.minimum(STEPS, count - first))):
                        at = (first + j) * step
                        if COPIED:
                            u = copied_row(here, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        else:
                            u = load_row(u_row, at, u_time, d, mask_d, WIDE).to(tl.float32)
                        b = states_row(
                            staged_b, first - stage + j, b_row, at, b_time, n, lane, mask_n, READ,
                            READ_CONSTRAINTS, BLOCK_N, BLOCK_D,
                        )  # fmt: skip
                        if KEPT:
                            dt = take_row(dts + j * (BLOCK_D * 4))
                        else:
                            x = load_row(delta_row, at, delta_time, d, mask_d, WIDE).to(tl.float32)
                            dt = time_step(x, bias, True, SOFTPLUS)
                        h = tl.exp2(rate * dt[None, :]) * h + b * (dt * u)[None, :]

            # Back again. What only this half needs is worked out here, or it would take registers above.
            _, d_again, _ = channel_block(again(block), group_channels, blocks_per_group, BLOCK_D, FULL_D)
            chunk_again = again(chunk_index).to(tl.int64)
            g = tl.load(
                grads_ptr + chunk_again * size + state_tile(n, d_again, again(d_inner)), mask=mask, other=0.0
            )
            skip = tl.zeros([BLOCK_D], tl.float32)
            if skip_ptr is not None:
                skip = tl.load(skip_ptr + d, mask=mask_d, other=0.0)
            row, start, end = chunk_range(
                again(chunk_index), start_ptr, end_ptr, length, n_chunks, CHUNK, PACKED
            )
            t0 = start
            if REVERSE:
                t0 = end - 1
            dout_row = dout_ptr + row * dout_batch + t0 * dout_time
            du_row = du_ptr + (row * length + t0) * d_inner
            ddelta_row = ddelta_ptr + (row * length + t0) * d_inner
            z_row = z_ptr
            if z_ptr is not None:
                z_row += row * z_batch + t0 * z_time
                dz_row = dz_ptr + (row * length + t0) * d_inner
            # The fourth row of every step: of the gate, or of what is added to du.
            fourth_row = z_row
            fourth_time = z_time
            if added_ptr is not None:
                fourth_row = added_ptr + (row * length + t0) * d_inner
                fourth_time = d_inner
            partial = (split % partials).to(tl.int64)
            sums_time = 2 * groups * padded_state
            sums_row = (
                sums_ptr + ((partial * batch + row) * length + t0) * sums_time + group * 2 * padded_state
            )
            da = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dskip = tl.zeros([BLOCK_D], tl.float32)
            dbias = tl.zeros([BLOCK_D], tl.float32)
            last = (count - 1) // STEPS
            if COPIED:
                copies_wait(0)
            # Of the STEPS places for states, the one of the state before these steps.
            turn = 0
            if KEPT:
                tiles_left()
                fetch_tile(kept, left + last * TILE, FETCH, FETCH_CONSTRAINTS)
                copies_made()
            if COPIED:
                buffer = rows + (last % 2) * (4 * ROWS)
                copy_block(
                    buffer, u_row, u_time, delta_row, delta_time, dout_row, dout_time, fourth_row,
                    fourth_time, last * STEPS, count, step, channel, WIDE, STEPS, BLOCK_D, ROW_COPY,
                    ROW_PIECE, ROW_BYTES,
                )  # fmt: skip
            for stage_back in range(trips(own_stages)):
                stage = (own_stages - 1 - stage_back) * STAGE
                if STAGE < CHUNK and stage_back > 0:
                    stage_rows(
                        staged_b, b_row, c_row, stage, count, step, b_time, c_time, d_state, BRING, BROUGHT,
                        WIDE, STAGE, BLOCK_N, BLOCK_D, -STAGE,
                    )  # fmt: skip
                subs_here = (tl.minimum(STAGE, count - stage) + STEPS - 1) // STEPS
                for back in range(trips(subs_here)):
                    inside = (subs_here - 1 - back) * STEPS
                    first = stage + inside
                    sub = first // STEPS
                    steps_here = tl.minimum(STEPS, count - first)
                    here = rows + (sub % 2) * (4 * ROWS)
                    if COPIED:
                        ahead = rows + ((sub + 1) % 2) * (4 * ROWS)
                        before = tl.maximum(first - STEPS, 0)
                        stage_wait()
                        copy_block(
                            ahead, u_row, u_time, delta_row, delta_time, dout_row, dout_time, fourth_row,
                            fourth_time, before, count, step, channel, WIDE, STEPS, BLOCK_D, ROW_COPY,
                            ROW_PIECE, ROW_BYTES,
                        )  # fmt: skip
                        copies_wait(1)
                    elif KEPT:
                        copies_wait(0)
                    # The states before each of these steps once more, and the step sizes, are kept. The state
                    # after them is at hand: the one that the steps behind them began with.
                    after = h
                    if KEPT:
                        h = take_tile(kept + turn * TILE, TAKE, TAKE_CONSTRAINTS)
                        keep_times(
                            times, delta_row, here + ROWS, first, count, step, delta_time, d, mask_d, lane,
                            bias, SOFTPLUS, WIDE, STEPS, BLOCK_D, ROW_READ, ROW_BYTES,
                        )  # fmt: skip
                    else:
                        h = tl.load(scratch_ptr + sub * (BLOCK_D * BLOCK_N) + local)
                        tl.store(scratch_ptr + subs * (BLOCK_D * BLOCK_N) + local, h)
                    for j in range(trips(steps_here - 1)):
                        at = (first + j) * step
                        if COPIED:
                            u = copied_row(here, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        else:
                            u = load_row(u_row, at, u_time, d, mask_d, WIDE).to(tl.float32)
                        b = states_row(
                            staged_b, inside + j, b_row, at, b_time, n, lane, mask_n, READ, READ_CONSTRAINTS,
                            BLOCK_N, BLOCK_D,
                        )  # fmt: skip
                        if KEPT:
                            dt = take_row(dts + j * (BLOCK_D * 4))
                        else:
                            x = load_row(delta_row, at, delta_time, d, mask_d, WIDE).to(tl.float32)
                            dt = time_step(x, bias, True, SOFTPLUS)
                        h = tl.exp2(rate * dt[None, :]) * h + b * (dt * u)[None, :]
                        if KEPT:
                            keep_tile(kept + (turn + j + 1) % STEPS * TILE, h, KEEP, KEEP_CONSTRAINTS)
                        else:
                            tl.store(scratch_ptr + (subs + j + 1) * (BLOCK_D * BLOCK_N) + local, h)
                    h = after
                    for back_j in range(trips(steps_here)):
                        j = steps_here - 1 - back_j
                        at = (first + j) * step
                        b = states_row(
                            staged_b, inside + j, b_row, at, b_time, n, lane, mask_n, READ, READ_CONSTRAINTS,
                            BLOCK_N, BLOCK_D,
                        )  # fmt: skip
                        c = states_row(
                            staged_c, inside + j, c_row, at, c_time, n, lane, mask_n, READ, READ_CONSTRAINTS,
                            BLOCK_N, BLOCK_D,
                        )  # fmt: skip
                        if COPIED:
                            u = copied_row(here, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                            x = copied_row(here + ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                            dy = copied_row(here + 2 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                        else:
                            u = load_row(u_row, at, u_time, d, mask_d, WIDE).to(tl.float32)
                            x = load_row(delta_row, at, delta_time, d, mask_d, WIDE).to(tl.float32)
                            dy = load_row(dout_row, at, dout_time, d, mask_d, WIDE).to(tl.float32)
                        if added_ptr is not None:
                            if COPIED:
                                more = copied_row(here + 3 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                            else:
                                # Before the sums over states, in which lanes that share a channel meet: none
                                # of them stores du until all have read it.
                                more = load_row(fourth_row, at, d_inner, d, mask_d, WIDE).to(tl.float32)
                        if KEPT:
                            dt = take_row(dts + j * (BLOCK_D * 4))
                        else:
                            dt = time_step(x, bias, True, SOFTPLUS)
                        to = row_offset(at, d_inner, d, WIDE)
                        if z_ptr is not None:
                            if COPIED:
                                z = copied_row(here + 3 * ROWS, j, lane, BLOCK_D, ROW_READ, ROW_BYTES)
                            else:
                                z = load_row(z_row, at, z_time, d, mask_d, WIDE).to(tl.float32)
                            gate = sigmoid(z)
                            y = tl.sum(h * c, axis=0) + skip * u
                            dz = dy * y * (gate * (1.0 + z * (1.0 - gate)))
                            dy *= z * gate
                            tl.store(dz_row + to, dz.to(dz_ptr.dtype.element_ty), mask=mask_d)
                        dskip += dy * u
                        g += c * dy[None, :]
                        add_channels(
                            sums_row + at.to(tl.int64) * sums_time, padded_state, g * (dt * u)[None, :],
                            h * dy[None, :], n, lane, mask_n, place,
                            shared_sums + j * 2 * SHARED_APART, SUMS, SUMS_CONSTRAINTS, ADD, ADD_CONSTRAINTS,
                            HELD, BLOCK_N, BLOCK_D,
                        )  # fmt: skip
                        gb = tl.sum(g * b, axis=0)
                        g *= tl.exp2(rate * dt[None, :])
                        # g and h are now those before this step.
                        if KEPT:
                            h = take_tile(kept + (turn + j) % STEPS * TILE, TAKE, TAKE_CONSTRAINTS)
                            if back_j == 0:
                                # The place of the last of STEPS steps is free now, for the state that the
                                # steps before these begin with: it is on its way during the others.
                                fetch_tile(
                                    kept + (turn + STEPS - 1) % STEPS * TILE,
                                    left + tl.maximum(sub - 1, 0) * TILE,
                                    FETCH,
                                    FETCH_CONSTRAINTS,
                                )
                                copies_made()
                        else:
                            h = tl.load(scratch_ptr + (subs + j) * (BLOCK_D * BLOCK_N) + local)
                        q = g * h
                        da += q * dt[None, :]
                        ddelta = gb * u + tl.sum(q * rate, axis=0) * LN2
                        if SOFTPLUS:
                            ddelta *= sigmoid(x + bias)
                        dbias += ddelta
                        du = gb * dt + skip * dy
                        if added_ptr is not None:
                            du += more
                        tl.store(du_row + to, du.to(du_ptr.dtype.element_ty), mask=mask_d)
                        tl.store(ddelta_row + to, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask_d)
                    turn = (turn + STEPS - 1) % STEPS
                    if HELD == 0:
                        stage_wait()
                        flush_channels(
                            sums_row, padded_state, shared_sums, first, steps_here, step, sums_time, ADD,
                            ADD_CONSTRAINTS, BLOCK_N,
                        )  # fmt: skip
            if COPIED or KEPT:
                copies_wait(0)
            # Kept over the loops, the addresses of the tile would take two registers a state.
            _, d_again, mask_again = channel_block(
                again(block), group_channels, blocks_per_group, BLOCK_D, FULL_D
            )
            chunk_again = again(chunk_index).to(tl.int64)
            tile = state_tile(n, d_again, again(d_inner))
            tl.store(grads_ptr + chunk_again * size + tile, da, mask=mask_n[:, None] & mask_again[None, :])
            if dskip_ptr is not None:
                tl.store(dskip_ptr + chunk_again * d_inner + d_again, dskip, mask=mask_again)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + chunk_again * d_inner + d_again, dbias, mask=mask_again)

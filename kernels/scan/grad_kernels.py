"""Kernels of the Triton backward of the selective scan; `triton_bwd.py` says what each does, launches it."""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssm_modal.kernels.scan.channel_sum import add_row, over_channels
from ssm_modal.kernels.scan.triton_common import (
    EXTENTS,
    LN2,
    LOG2E,
    channel_block,
    chunk_range,
    load_row,
    load_states,
    row_offset,
    state_block,
    state_tile,
    time_step,
    trips,
)
from ssm_modal.kernels.triton_math import NVIDIA, sigmoid


@triton.jit
def again(x):
    """x (fp32 or int32), of which the compiler does not know that it has seen it before."""
    if NVIDIA:
        if x.dtype == tl.int32:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
            )
    else:
        return x


@triton.jit(do_not_specialize=EXTENTS)
def chunk_grad_kernel(
    dout_ptr,  # (batch, length, d_inner)
    z_ptr,  # (batch, length, d_inner) or None
    delta_ptr,  # (batch, length, d_inner)
    a_ptr,  # (d_state, d_inner) fp32
    c_ptr,  # (batch, length, groups, d_state)
    bias_ptr,  # (d_inner,) fp32 or None
    grads_ptr,  # out: (chunks, d_state, d_inner) fp32
    sums_ptr,  # out: (chunks, d_inner) fp32
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
    STEPS: tl.constexpr,
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

    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, trips(count), STEPS):
        dys = ()
        xs = ()
        zs = ()
        for j in tl.static_range(STEPS):
            at = tl.minimum(first + j, count - 1) * step
            # A row beyond the end is 0, so its step adds nothing; its dt is 0, so it changes nothing.
            dys += (load_row(dout_ptr, at, dout_time, d, mask_d & (first + j < count), WIDE),)
            xs += (load_row(delta_ptr, at, delta_time, d, mask_d, WIDE),)
            if z_ptr is not None:
                zs += (load_row(z_ptr, at, z_time, d, mask_d, WIDE),)
        for j in tl.static_range(STEPS):
            at = tl.minimum(first + j, count - 1) * step
            c = load_states(c_ptr, at, c_time, n, mask_n)
            dt = time_step(xs[j], bias, first + j < count, SOFTPLUS)
            dy = dys[j].to(tl.float32)
            if z_ptr is not None:
                z = zs[j].to(tl.float32)
                dy *= z * sigmoid(z)
            total += dt
            g = tl.exp2(rate * dt[None, :]) * (g + c[:, None] * dy[None, :])
    tl.store(grads_ptr + chunk * d_inner * d_state + tile, g, mask=mask)
    tl.store(sums_ptr + chunk * d_inner + d, total, mask=mask_d)


@triton.jit(do_not_specialize=EXTENTS)
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
    scratch_ptr,  # (programs, subs, BLOCK_N, BLOCK_D) fp32, a program's own
    du_ptr,  # out: (batch, length, d_inner), contiguous
    ddelta_ptr,  # out: (batch, length, d_inner), contiguous
    db_ptr,  # out: (splits, batch, length, groups, d_state) fp32
    dc_ptr,  # out: (splits, batch, length, groups, d_state) fp32
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
    subs,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SUM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_D: tl.constexpr,
    FULL_N: tl.constexpr,
):
    """One program a chunk, group and share of the group's channel blocks, which it takes in turn."""
    pid = tl.program_id(0)
    n, mask_n = state_block(d_state, BLOCK_N, FULL_N)
    size = d_inner.to(tl.int64) * d_state
    bc_time = groups * d_state
    lane = tl.arange(0, BLOCK_D)
    # The scratch is aligned, but the rows of a tile must lie across lanes as they do everywhere else.
    local = tl.multiple_of(n[:, None] * BLOCK_D + lane[None, :], [1, 1])
    local = tl.max_contiguous(local, [1, 2])
    scratch_ptr += pid.to(tl.int64) * subs * (BLOCK_D * BLOCK_N)
    split = pid % splits
    group_index = (pid // splits) % groups
    group = group_index.to(tl.int64)
    chunk_index = pid // (splits * groups)
    row, start, end = chunk_range(chunk_index, start_ptr, end_ptr, length, n_chunks, CHUNK, PACKED)
    chunk = chunk_index.to(tl.int64)
    count = (end - start).to(tl.int32)
    own_subs = (count + STEPS - 1) // STEPS
    t0 = start
    step = 1
    if REVERSE:
        t0 = end - 1
        step = -1
    partial = ((split.to(tl.int64) * batch + row) * length + t0) * bc_time + group * d_state
    db_row = db_ptr + partial
    dc_row = dc_ptr + partial
    first_block = split * blocks_per_split
    own_blocks = tl.minimum(blocks_per_split, blocks_per_group - first_block)
    for r in range(trips(own_blocks)):
        block = group_index * blocks_per_group + first_block + r
        _, d, mask_d = channel_block(block, group_channels, blocks_per_group, BLOCK_D, FULL_D)
        mask = mask_n[:, None] & mask_d[None, :]
        tile = state_tile(n, d, d_inner)
        rate = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2E
        bias = tl.zeros([BLOCK_D], tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0)
        skip = tl.zeros([BLOCK_D], tl.float32)
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + d, mask=mask_d, other=0.0)
        u_row = u_ptr + row * u_batch + t0 * u_time
        delta_row = delta_ptr + row * delta_batch + t0 * delta_time
        dout_row = dout_ptr + row * dout_batch + t0 * dout_time
        b_row = b_ptr + row * b_batch + t0 * b_time + group * b_group
        c_row = c_ptr + row * c_batch + t0 * c_time + group * c_group
        du_row = du_ptr + (row * length + t0) * d_inner
        ddelta_row = ddelta_ptr + (row * length + t0) * d_inner
        if z_ptr is not None:
            z_row = z_ptr + row * z_batch + t0 * z_time
            dz_row = dz_ptr + (row * length + t0) * d_inner

        # Forward over the chunk: every STEPS-th state into the scratch.
        h = tl.load(states_ptr + chunk * size + tile, mask=mask, other=0.0)
        for s in range(trips(own_subs)):
            tl.store(scratch_ptr + s * (BLOCK_D * BLOCK_N) + local, h)
            for j in tl.static_range(STEPS):
                i = s * STEPS + j
                at = tl.minimum(i, count - 1) * step
                u = load_row(u_row, at, u_time, d, mask_d, WIDE).to(tl.float32)
                x = load_row(delta_row, at, delta_time, d, mask_d, WIDE)
                b = load_states(b_row, at, b_time, n, mask_n)
                dt = time_step(x, bias, i < count, SOFTPLUS)
                h = tl.exp2(rate * dt[None, :]) * h + b[:, None] * (dt * u)[None, :]

        # Back again. Steps beyond the end stand at the last step with dt and dy of 0: they change no state,
        # add 0, and store nothing.
        g = tl.load(grads_ptr + chunk * size + tile, mask=mask, other=0.0)
        da = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dskip = tl.zeros([BLOCK_D], tl.float32)
        dbias = tl.zeros([BLOCK_D], tl.float32)
        for back in range(trips(own_subs)):
            s = own_subs - 1 - back
            h = tl.load(scratch_ptr + s * (BLOCK_D * BLOCK_N) + local)
            us = ()
            xs = ()
            douts = ()
            zs = ()
            for j in tl.static_range(STEPS):
                at = tl.minimum(s * STEPS + j, count - 1) * step
                us += (load_row(u_row, at, u_time, d, mask_d, WIDE),)
                xs += (load_row(delta_row, at, delta_time, d, mask_d, WIDE),)
                douts += (load_row(dout_row, at, dout_time, d, mask_d, WIDE),)
                if z_ptr is not None:
                    zs += (load_row(z_row, at, z_time, d, mask_d, WIDE),)
            before = ()
            dts = ()
            dys = ()
            dzs = ()
            dcs = ()
            for j in tl.static_range(STEPS):
                i = s * STEPS + j
                at = tl.minimum(i, count - 1) * step
                b = load_states(b_row, at, b_time, n, mask_n)
                u = us[j].to(tl.float32)
                dt = time_step(xs[j], bias, i < count, SOFTPLUS)
                before += (h,)
                dts += (dt,)
                h = tl.exp2(rate * dt[None, :]) * h + b[:, None] * (dt * u)[None, :]
                dy = douts[j].to(tl.float32)
                if z_ptr is not None:
                    c = load_states(c_row, at, c_time, n, mask_n)
                    z = zs[j].to(tl.float32)
                    gate = sigmoid(z)
                    y = tl.sum(h * c[:, None], axis=0) + skip * u
                    dzs += (dy * y * (gate * (1.0 + z * (1.0 - gate))),)
                    dy *= z * gate
                dy = tl.where(i < count, dy, 0.0)
                dys += (dy,)
                dskip += dy * u
                dcs += (over_channels(h * dy[None, :], lane, SUM, CONSTRAINTS, BLOCK_N),)
            for j in tl.static_range(STEPS):
                i = s * STEPS + j
                at = tl.minimum(i, count - 1) * step
                valid = i < count
                add_row(
                    dc_row, at, bc_time, dcs[j], n, lane, d_state, r > 0, valid, SUM, WIDE, BLOCK_N, BLOCK_D
                )
                if z_ptr is not None:
                    here = dz_row + row_offset(at, d_inner, d, WIDE)
                    tl.store(here, dzs[j].to(dz_ptr.dtype.element_ty), mask=mask_d & valid)
            dus = ()
            ddeltas = ()
            dbs = ()
            for jj in tl.static_range(STEPS):
                i = s * STEPS + (STEPS - 1 - jj)
                at = tl.minimum(i, count - 1) * step
                b = load_states(b_row, at, b_time, n, mask_n)
                c = load_states(c_row, at, c_time, n, mask_n)
                u = us[STEPS - 1 - jj].to(tl.float32)
                dt = dts[STEPS - 1 - jj]
                dy = dys[STEPS - 1 - jj]
                g += c[:, None] * dy[None, :]
                dbs += (over_channels(g * (dt * u)[None, :], lane, SUM, CONSTRAINTS, BLOCK_N),)
                gb = tl.sum(g * b[:, None], axis=0)
                # The decays once more: kept, they would take STEPS registers a state.
                g *= tl.exp2(rate * again(dt)[None, :])
                # g is now the gradient of the state before this step.
                if jj == STEPS - 1:
                    q = g * tl.load(scratch_ptr + s * (BLOCK_D * BLOCK_N) + local)
                else:
                    q = g * before[STEPS - 1 - jj]
                da += q * dt[None, :]
                ddelta = gb * u + tl.sum(q * rate, axis=0) * LN2
                if SOFTPLUS:
                    ddelta *= sigmoid(xs[STEPS - 1 - jj].to(tl.float32) + bias)
                dbias += tl.where(i < count, ddelta, 0.0)
                dus += (gb * dt + skip * dy,)
                ddeltas += (ddelta,)
            for jj in tl.static_range(STEPS):
                i = s * STEPS + (STEPS - 1 - jj)
                at = tl.minimum(i, count - 1) * step
                valid = i < count
                here = row_offset(at, d_inner, d, WIDE)
                tl.store(du_row + here, dus[jj].to(du_ptr.dtype.element_ty), mask=mask_d & valid)
                tl.store(ddelta_row + here, ddeltas[jj].to(ddelta_ptr.dtype.element_ty), mask=mask_d & valid)
                add_row(
                    db_row, at, bc_time, dbs[jj], n, lane, d_state, r > 0, valid, SUM, WIDE, BLOCK_N, BLOCK_D
                )
        # Kept over the loops, the addresses of the tile would take two registers a state.
        tl.store(grads_ptr + chunk * size + state_tile(n, again(d), d_inner), da, mask=mask)
        if dskip_ptr is not None:
            tl.store(dskip_ptr + chunk * d_inner + d, dskip, mask=mask_d)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + chunk * d_inner + d, dbias, mask=mask_d)

"""Triton backward of the selective scan: chunks of time in parallel, from the states saved at their borders.

With g_t the gradient of the loss in h_t, dy_t that in the output before the gate and a_t = exp(dt_t A):

    g_t  = C_t dy_t + a_{t+1} g_{t+1}
    dB_t = sum over d of g_t dt_t u_t          dC_t  = sum over d of h_t dy_t
    du_t = dt_t <g_t, B_t> + D dy_t            ddt_t = u_t <g_t, B_t> + <g_t a_t h_{t-1}, A>
    dA   = sum over t of g_t a_t h_{t-1} dt_t

1. `chunk_grad_kernel`: what each chunk adds to the gradient of the state entering it, and its sum of dt.
2. `triton_common.carry`, from the last chunk to the first: the gradient of the state leaving each chunk.
3. `grad_kernel`: a chunk sweeps forward from its saved state and keeps every STEPS-th state in a scratch that
   is read back soon after; then, from the last STEPS steps to the first, rebuilds the states in registers and
   takes the gradients. The sums over channels for dB and dC are those of `channel_sum.py`.

Nothing is divided by a decay and nothing is atomic: dB and dC come as partial sums over blocks of channels,
dA, dD and the bias as partial sums over chunks, added up afterwards, so the result is the same in every run.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.scan.channel_sum import add_row, channel_sum_assembly, over_channels
from ssm_modal.kernels.scan.launch import ScanLaunch, padded_state, scan_launch, shipped_launches
from ssm_modal.kernels.scan.triton_common import (
    EXTENTS,
    LN2,
    LOG2E,
    carry,
    channel_block,
    chunk_range,
    last_contiguous,
    load_row,
    load_states,
    on_its_device,
    row_offset,
    state_block,
    state_tile,
    time_step,
    trips,
    wide_offsets,
    widen,
)
from ssm_modal.kernels.sequences import Sequences
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


@on_its_device
def selective_scan_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    boundaries: Tensor,
    *,
    launch: ScanLaunch | None = None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:
    """Gradients of `selective_scan_fwd`, to the same arguments and the same `launch`.

    dout: (batch, length, d_inner), dtype of u; dfinal_state: (batch or sequences, d_inner, d_state) fp32 or
    None for zeros; boundaries: the third result of the forward. Returns du, ddelta, dA, dB, dC, dD, dz,
    ddelta_bias, dinitial_state, each contiguous, of its argument's shape and dtype, None where that argument
    was None.
    """
    batch, length, d_inner = u.shape
    groups, d_state = B.shape[2], B.shape[3]
    rows = batch if seqs is None else seqs.n
    if launch is None:
        launch = scan_launch(batch, length, d_inner, groups, d_state, u.device, seqs)
    chunk_size = launch.chunk_size
    exit_grad = None if dfinal_state is None else dfinal_state.transpose(1, 2).contiguous()
    if u.numel() == 0:
        dinitial = None
        if initial_state is not None:
            dinitial = (
                initial_state.new_zeros(rows, d_inner, d_state)
                if dfinal_state is None
                else dfinal_state.clone().contiguous()
            )
        plain = [None if x is None else x.new_zeros(x.shape) for x in (u, delta, A, B, C, D, z, delta_bias)]
        return (*plain, dinitial)  # type: ignore[return-value]

    dtype_b, dtype_c = B.dtype, C.dtype
    u, delta, dout, A = last_contiguous(u), last_contiguous(delta), last_contiguous(dout), A.t().contiguous()
    z = None if z is None else last_contiguous(z)
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    B, C = widen(B, d_inner), widen(C, d_inner)
    chunks = boundaries.shape[0]
    n_chunks = 0 if seqs is not None else chunks // batch
    table = None if seqs is None else seqs.chunks(chunk_size)
    start, end = (None, None) if table is None else (table.start, table.end)
    group_channels = d_inner // groups
    z_strides = (0, 0) if z is None else (z.stride(0), z.stride(1))
    rows_apart = (x.stride(1) for x in (u, delta, dout, B, C, u if z is None else z))
    rows_apart = (*rows_apart, d_inner, groups * d_state)
    options = {
        "SOFTPLUS": delta_softplus,
        "PACKED": seqs is not None,
        "REVERSE": reverse,
        "WIDE": wide_offsets(chunk_size, *rows_apart),
        "CHUNK": chunk_size,
        "BLOCK_N": padded_state(d_state),
        "FULL_D": group_channels % launch.block == 0,
        "FULL_N": padded_state(d_state) == d_state,
    }

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    grads, sums = empty(chunks, d_state, d_inner), empty(chunks, d_inner)
    blocks_per_group = triton.cdiv(group_channels, launch.block)
    blocks = groups * blocks_per_group
    chunk_grad_kernel[(chunks * blocks,)](
        dout,
        z,
        delta,
        A,
        C,
        delta_bias,
        grads,
        sums,
        start,
        end,
        dout.stride(0),
        dout.stride(1),
        *z_strides,
        delta.stride(0),
        delta.stride(1),
        C.stride(0),
        C.stride(1),
        C.stride(2),
        length,
        n_chunks,
        d_inner,
        d_state,
        group_channels,
        blocks_per_group,
        blocks,
        STEPS=launch.fwd_steps,
        BLOCK_D=launch.block,
        num_warps=1,
        maxnreg=launch.fwd_registers,
        **options,
    )
    dinitial = carry(
        grads,
        sums,
        A,
        exit_grad,
        batch=batch,
        seqs=seqs,
        chunk_size=chunk_size,
        run_length=launch.run_length,
        descending=not reverse,
    )

    du = torch.empty((batch, length, d_inner), dtype=u.dtype, device=u.device)
    ddelta = torch.empty_like(du)
    dz = None if z is None else torch.empty_like(du)
    dskip = None if D is None else sums
    dbias = None if delta_bias is None else empty(chunks, d_inner)
    blocks_per_group = triton.cdiv(group_channels, launch.block)
    blocks_per_split = triton.cdiv(blocks_per_group, launch.bwd_splits)
    splits = triton.cdiv(blocks_per_group, blocks_per_split)
    partial_b, partial_c = (empty(splits, batch, length, groups, d_state) for _ in range(2))
    items = chunks * groups * splits
    subs = triton.cdiv(min(chunk_size, length), launch.bwd_steps)
    scratch = empty(items, subs, padded_state(d_state), launch.block)
    channel_sum, constraints = channel_sum_assembly(padded_state(d_state), launch.block)
    grad_kernel[(items,)](
        dout,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        boundaries,
        grads,
        scratch,
        du,
        ddelta,
        partial_b,
        partial_c,
        dskip,
        dz,
        dbias,
        start,
        end,
        dout.stride(0),
        dout.stride(1),
        u.stride(0),
        u.stride(1),
        delta.stride(0),
        delta.stride(1),
        B.stride(0),
        B.stride(1),
        B.stride(2),
        C.stride(0),
        C.stride(1),
        C.stride(2),
        *z_strides,
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
        STEPS=launch.bwd_steps,
        SUM=channel_sum,
        CONSTRAINTS=constraints,
        BLOCK_D=launch.block,
        num_warps=1,
        maxnreg=launch.bwd_registers,
        **options,
    )
    return (
        du,
        ddelta,
        grads.sum(0).t().contiguous(),
        (partial_b[0] if splits == 1 else partial_b.sum(0)).to(dtype_b),
        (partial_c[0] if splits == 1 else partial_c.sum(0)).to(dtype_c),
        None if dskip is None else dskip.sum(0),
        dz,
        None if dbias is None else dbias.sum(0),
        None if initial_state is None else dinitial.transpose(1, 2).contiguous(),
    )


def aot_cases() -> list[AotCase]:
    """Both kernels at every row of the table in bf16 with fp32 B and C; at d_state 16 more."""
    cases = []
    for d_state, launch in shipped_launches():
        if launch.serial:
            continue
        variants = [("bf16", False)]
        if d_state == 16:
            variants += [("fp32", False), ("fp16", True)]
        for dtype, packed in variants:
            minor = d_state not in (16, 256)
            table = "*i64" if packed else None
            names = ("dout", "u", "delta", "b", "c", "z")
            strides = {f"{name}_{axis}": 16 for name in names for axis in ("batch", "time")}
            strides |= {"b_group": 16, "c_group": 16}
            args: dict[str, object] = {f"{name}_ptr": f"*{dtype}" for name in ("dout", "u", "delta", "z")}
            args |= dict.fromkeys(("b_ptr", "c_ptr"), f"*{dtype}" if packed else "*fp32")
            args |= dict.fromkeys(("a_ptr", "bias_ptr", "grads_ptr", "sums_ptr"), "*fp32")
            args |= {"start_ptr": table, "end_ptr": table} | strides
            args |= {
                "batch": 8,
                "length": 8192,
                "n_chunks": 128,
                "d_inner": 2048,
                "d_state": d_state,
                "groups": 1,
                "group_channels": 2048,
                "blocks_per_group": 64,
                "blocks": 64,
                "SOFTPLUS": True,
                "PACKED": packed,
                "REVERSE": packed,
                "WIDE": False,
                "CHUNK": launch.chunk_size,
                "STEPS": launch.fwd_steps,
                "BLOCK_D": launch.block,
                "BLOCK_N": padded_state(d_state),
                "FULL_D": not packed,
                "FULL_N": True,
            }
            label = f"N{d_state} {dtype}{' packed reverse' if packed else ''}"
            own = {p.name: args[p.name] for p in chunk_grad_kernel.params}
            cases.append(
                AotCase(
                    chunk_grad_kernel,
                    label,
                    own,
                    num_warps=1,
                    maxnreg=launch.fwd_registers,
                    minor=minor,
                )
            )
            args |= dict.fromkeys(("skip_ptr", "states_ptr", "scratch_ptr", "db_ptr", "dc_ptr"), "*fp32")
            args |= dict.fromkeys(("dskip_ptr", "dbias_ptr"), "*fp32")
            args |= dict.fromkeys(("du_ptr", "ddelta_ptr", "dz_ptr"), f"*{dtype}")
            channel_sum, constraints = channel_sum_assembly(padded_state(d_state), launch.block)
            args |= {
                "blocks_per_split": 32,
                "splits": launch.bwd_splits,
                "subs": launch.chunk_size // launch.bwd_steps,
                "STEPS": launch.bwd_steps,
                "SUM": channel_sum,
                "CONSTRAINTS": constraints,
                "BLOCK_D": launch.block,
            }
            own = {p.name: args[p.name] for p in grad_kernel.params}
            cases.append(
                AotCase(grad_kernel, label, own, num_warps=1, maxnreg=launch.bwd_registers, minor=minor)
            )
    return cases

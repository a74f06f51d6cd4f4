"""Triton forward of the selective scan: chunks of time in parallel, sequential inside a chunk.

A program is one warp and its tile of states [BLOCK_N, BLOCK_D], channels across lanes: up to d_state 16 a
thread holds all states of its channel, so that a time step reads one coalesced row of each input and the sum
over states needs no exchange; beyond that, tiles have fewer channels and lanes share one.

1. `chunk_state_kernel`: each chunk entered with zero: the state it ends with and its sum of dt.
2. `triton_common.carry`: the state entering each chunk.
3. `output_kernel`: each chunk again with that state: outputs, with skip connection and gate.

Where the batch and the channels alone fill the GPU, or one chunk covers the sequence, `output_kernel` walks
through the whole sequence (SERIAL) and passes 1 and 2 fall away. Either way the states entering the chunks
are what the backward gets.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.scan.launch import (
    ScanLaunch,
    boundaries_shape,
    padded_state,
    scan_launch,
    shipped_launches,
)
from ssm_modal.kernels.scan.triton_common import (
    EXTENTS,
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
from ssm_modal.kernels.triton_math import sigmoid


@triton.jit(do_not_specialize=EXTENTS)
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
    STEPS: tl.constexpr,
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
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, trips(count), STEPS):
        us = ()
        xs = ()
        for j in tl.static_range(STEPS):
            at = tl.minimum(first + j, count - 1) * step
            us += (load_row(u_ptr, at, u_time, d, mask_d, WIDE),)
            xs += (load_row(delta_ptr, at, delta_time, d, mask_d, WIDE),)
        for j in tl.static_range(STEPS):
            at = tl.minimum(first + j, count - 1) * step
            b = load_states(b_ptr, at, b_time, n, mask_n)
            dt = time_step(xs[j], bias, first + j < count, SOFTPLUS)
            total += dt
            h = tl.exp2(rate * dt[None, :]) * h + b[:, None] * (dt * us[j].to(tl.float32))[None, :]
    tl.store(states_ptr + chunk * d_inner * d_state + tile, h, mask=mask)
    tl.store(sums_ptr + chunk * d_inner + d, total, mask=mask_d)


@triton.jit(do_not_specialize=EXTENTS)
def output_kernel(
    u_ptr,  # (batch, length, d_inner)
    delta_ptr,  # (batch, length, d_inner)
    a_ptr,  # (d_state, d_inner) fp32
    b_ptr,  # (batch, length, groups, d_state)
    c_ptr,  # (batch, length, groups, d_state)
    skip_ptr,  # D: (d_inner,) fp32 or None
    z_ptr,  # (batch, length, d_inner) or None
    bias_ptr,  # (d_inner,) fp32 or None
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
    STEPS: tl.constexpr,
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
    if z_ptr is not None:
        z_ptr += row * z_batch

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
        if z_ptr is not None:
            z_row = z_ptr + t * z_time
        for first in range(0, trips(count), STEPS):
            # All rows of these steps are under way before the first is used, and outputs wait for the last:
            # no load may pass a store.
            us = ()
            xs = ()
            zs = ()
            for j in tl.static_range(STEPS):
                at = tl.minimum(first + j, count - 1) * step
                us += (load_row(u_row, at, u_time, d, mask_d, WIDE),)
                xs += (load_row(delta_row, at, delta_time, d, mask_d, WIDE),)
                if z_ptr is not None:
                    zs += (load_row(z_row, at, z_time, d, mask_d, WIDE),)
            ys = ()
            for j in tl.static_range(STEPS):
                at = tl.minimum(first + j, count - 1) * step
                b = load_states(b_row, at, b_time, n, mask_n)
                c = load_states(c_row, at, c_time, n, mask_n)
                u = us[j].to(tl.float32)
                dt = time_step(xs[j], bias, first + j < count, SOFTPLUS)
                h = tl.exp2(rate * dt[None, :]) * h + b[:, None] * (dt * u)[None, :]
                y = tl.sum(h * c[:, None], axis=0) + skip * u
                if z_ptr is not None:
                    z = zs[j].to(tl.float32)
                    y *= z * sigmoid(z)
                ys += (y,)
            for j in tl.static_range(STEPS):
                here = out_row + row_offset((first + j) * step, out_time, d, WIDE)
                tl.store(here, ys[j].to(out_ptr.dtype.element_ty), mask=mask_d & (first + j < count))
    if SERIAL:
        tl.store(final_ptr + item * size + tile, h, mask=mask)


@on_its_device
def selective_scan_fwd(
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
    *,
    launch: ScanLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selective scan (arXiv 2312.00752, algorithm 2) of validated arguments in Triton.

    u, delta, z: (batch, length, d_inner), B, C: (batch, length, groups, d_state), one dtype of fp32, bf16,
    fp16, any strides. A: (d_inner, d_state), D, delta_bias: (d_inner,), initial_state: (batch or sequences,
    d_inner, d_state), fp32. `launch` overrides the table of `launch.py` (the backward must be given the
    same). Returns out (batch, length, d_inner) in the dtype of u, the final state (batch or sequences,
    d_inner, d_state) fp32, and the states entering the chunks, `boundaries_shape`, fp32, for
    `selective_scan_bwd`.
    """
    batch, length, d_inner = u.shape
    groups, d_state = B.shape[2], B.shape[3]
    rows = batch if seqs is None else seqs.n
    lengths = None if seqs is None else seqs.lengths
    if launch is None:
        launch = scan_launch(batch, length, d_inner, groups, d_state, u.device, seqs)
    chunk_size = launch.chunk_size
    out = torch.empty((batch, length, d_inner), dtype=u.dtype, device=u.device)
    states = torch.empty(
        boundaries_shape(batch, length, d_inner, d_state, groups, lengths, chunk_size),
        dtype=torch.float32,
        device=u.device,
    )
    if out.numel() == 0:
        shape = (rows, d_inner, d_state)
        final = torch.zeros(shape, device=u.device) if initial_state is None else initial_state.clone()
        return out, final.contiguous(), states
    initial = None if initial_state is None else initial_state.transpose(1, 2).contiguous()

    u, delta, A = last_contiguous(u), last_contiguous(delta), A.t().contiguous()
    z = None if z is None else last_contiguous(z)
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    B, C = widen(B, d_inner), widen(C, d_inner)
    n_chunks = 0 if seqs is not None else states.shape[0] // batch
    table = None if seqs is None else seqs.chunks(chunk_size)
    group_channels = d_inner // groups
    blocks_per_group = triton.cdiv(group_channels, launch.block)
    blocks = groups * blocks_per_group
    shape_args = (length, n_chunks, d_inner, d_state, group_channels, blocks_per_group, blocks)
    options = {
        "SOFTPLUS": delta_softplus,
        "PACKED": seqs is not None,
        "REVERSE": reverse,
        "WIDE": wide_offsets(
            chunk_size, *(x.stride(1) for x in (u, delta, B, C, out, u if z is None else z))
        ),
        "CHUNK": chunk_size,
        "STEPS": launch.fwd_steps,
        "BLOCK_D": launch.block,
        "BLOCK_N": padded_state(d_state),
        "FULL_D": group_channels % launch.block == 0,
        "FULL_N": padded_state(d_state) == d_state,
        "num_warps": 1,
    }
    chunk_start, chunk_end = (None, None) if table is None else (table.start, table.end)
    if launch.serial:
        items = rows
        final = torch.empty((rows, d_state, d_inner), dtype=torch.float32, device=u.device)
        bounds = (None, None, None)
        if table is not None and seqs is not None:
            bounds = (seqs.cu_seqlens, seqs.cu_seqlens[1:], table.first)
    else:
        items = states.shape[0]
        bounds = (chunk_start, chunk_end, None)
        sums = torch.empty((items, d_inner), dtype=torch.float32, device=u.device)
        chunk_state_kernel[(items * blocks,)](
            u,
            delta,
            A,
            B,
            delta_bias,
            states,
            sums,
            chunk_start,
            chunk_end,
            u.stride(0),
            u.stride(1),
            delta.stride(0),
            delta.stride(1),
            B.stride(0),
            B.stride(1),
            B.stride(2),
            *shape_args,
            maxnreg=launch.fwd_registers,
            **options,
        )
        final = carry(
            states,
            sums,
            A,
            initial,
            batch=batch,
            seqs=seqs,
            chunk_size=chunk_size,
            run_length=launch.run_length,
            descending=reverse,
        )
    output_kernel[(items * blocks,)](
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        out,
        states,
        initial if launch.serial else None,
        final if launch.serial else None,
        *bounds,
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
        0 if z is None else z.stride(0),
        0 if z is None else z.stride(1),
        out.stride(0),
        out.stride(1),
        *shape_args,
        SERIAL=launch.serial,
        maxnreg=launch.serial_registers if launch.serial else launch.fwd_registers,
        **options,
    )
    return out, final.transpose(1, 2).contiguous(), states


def aot_cases() -> list[AotCase]:
    """Both kernels at every row of the table in bf16 with fp32 B and C; at d_state 16 more."""
    cases = []
    for d_state, launch in shipped_launches():
        variants = [("bf16", False)]
        if d_state == 16:
            variants += [("fp32", False), ("fp16", True)]
        for dtype, packed in variants:
            minor = d_state not in (16, 256)
            table = "*i64" if packed else None
            shared: dict[str, object] = {
                "u_ptr": f"*{dtype}",
                "delta_ptr": f"*{dtype}",
                "a_ptr": "*fp32",
                "b_ptr": f"*{dtype}" if packed else "*fp32",
                "bias_ptr": "*fp32",
                "states_ptr": "*fp32",
                "start_ptr": table,
                "end_ptr": table,
                "length": 8192,
                "n_chunks": 128,
                "d_inner": 2048,
                "d_state": d_state,
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
            strides = {
                f"{name}_{axis}": 16
                for name in ("u", "delta", "b", "c", "z", "out")
                for axis in ("batch", "time")
            }
            strides |= {"b_group": 16, "c_group": 16}
            label = f"N{d_state} {dtype}{' packed reverse' if packed else ''}"
            if not launch.serial:
                args = shared | {k: v for k, v in strides.items() if k.split("_")[0] in ("u", "delta", "b")}
                args |= {"sums_ptr": "*fp32"}
                cases.append(
                    AotCase(
                        chunk_state_kernel,
                        label,
                        args,
                        num_warps=1,
                        maxnreg=launch.fwd_registers,
                        minor=minor,
                    )
                )
            args = shared | strides
            args |= {
                "c_ptr": shared["b_ptr"],
                "skip_ptr": "*fp32",
                "z_ptr": f"*{dtype}",
                "out_ptr": f"*{dtype}",
                "initial_ptr": "*fp32" if launch.serial else None,
                "final_ptr": "*fp32" if launch.serial else None,
                "first_ptr": table if launch.serial else None,
                "SERIAL": launch.serial,
            }
            label += " serial" if launch.serial else ""
            registers = launch.serial_registers if launch.serial else launch.fwd_registers
            cases.append(
                AotCase(
                    output_kernel,
                    label,
                    args,
                    num_warps=1,
                    maxnreg=registers,
                    minor=minor,
                )
            )
    return cases

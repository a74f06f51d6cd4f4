"""How the scan's backward is launched on a call: constants, grids and scratch, kept for the calls to come.

Beside the launch table's numbers a gradient program's shared memory counts: the fewer bytes it stages, the
more programs run at a time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.scan.channel_sum import channel_sum, memory_states, sums_bytes
from ssm_modal.kernels.scan.chunk_kernels import chunk_grad_kernel
from ssm_modal.kernels.scan.decays import decay
from ssm_modal.kernels.scan.grad_kernels import grad_kernel
from ssm_modal.kernels.scan.keeping import kept_states
from ssm_modal.kernels.scan.launch import (
    ScanLaunch,
    adds_vectors,
    multiprocessors,
    padded_state,
    resident,
    scan_launch,
    shared_memory,
)
from ssm_modal.kernels.scan.prefetch import can_copy, row_copies
from ssm_modal.kernels.scan.staging import bringing, can_bring, row_bits, shared_bytes, staging
from ssm_modal.kernels.scan.triton_common import wide_offsets


class GradientPlan(NamedTuple):
    """What a call's shapes, strides and alignment settle, of `chunk_grad_kernel` and of `grad_kernel`."""

    launch: ScanLaunch
    chunk_grads: Launcher
    chunk_grid: tuple[int]
    chunk_numbers: tuple[int, ...]
    gradients: Launcher
    grid: tuple[int]
    numbers: tuple[int, ...]
    sums_shape: tuple[int, ...]
    """Of the sums for dB and dC."""
    scratch_shape: tuple[int, ...]


@functools.lru_cache(maxsize=512)
def gradient_plan(
    launch: ScanLaunch | None,
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
    groups: int,
    d_state: int,
    chunks: int,
    u: tuple[int, ...],
    delta: tuple[int, ...],
    dout: tuple[int, ...],
    B: tuple[int, ...],
    C: tuple[int, ...],
    z: tuple[int, ...] | None,
    low_u: int,
    low: int,
    low_B: int,
    low_C: int,
    softplus: bool,
    packed: bool,
    reverse: bool,
    deterministic: bool,
    gated: bool,
    added: bool,
) -> GradientPlan:
    """u, delta, dout, B, C, z: strides. low_u, low_B, low_C: the low bits of their addresses; low: those of
    all else that is copied by rows together. launch: None for the table's. gated: y is given."""
    batch, length, d_inner = shape
    if launch is None:
        launch = scan_launch(batch, length, d_inner, groups, d_state, device)
    n_chunks = 0 if packed else chunks // batch
    group_channels = d_inner // groups
    z_strides = (0, 0) if z is None else z[:2]
    size = dtype.itemsize
    low_u = row_bits(low_u, u, size)
    whole = (length * d_inner, d_inner, 1)
    for strides in (delta, dout, z, whole if gated or added else None):
        low |= 0 if strides is None else row_bits(0, strides, size)
    low_B, low_C = row_bits(low_B, B, size), row_bits(low_C, C, size)
    wide = wide_offsets(launch.chunk_size, u[1], delta[1], dout[1], B[1], C[1], z_strides[1], d_inner)
    kept = bool(kept_states(d_state, launch.block)["KEPT"])
    chunk_grads, gradients = _launchers(
        launch,
        d_state,
        dtype,
        group_channels,
        softplus,
        packed,
        reverse,
        wide,
        can_bring(d_state, size, low_C),
        can_copy(launch.fwd_block, group_channels, size, low),
        can_bring(d_state, size, low_B | low_C),
        can_copy(launch.block, group_channels, size, low | low_u),
        adds_vectors(device),
        gated,
    )
    # What the gradients take for dout and the gate.
    inner, gate = (whole, (0, 0)) if gated else (dout, z_strides)
    chunk_per_group = -(-group_channels // launch.fwd_block)
    chunk_blocks = groups * chunk_per_group
    blocks_per_group = -(-group_channels // launch.block)
    blocks_per_split = -(-blocks_per_group // launch.bwd_splits) if deterministic else 1
    splits = -(-blocks_per_group // blocks_per_split)
    partials = splits if deterministic else 1
    items = chunks * groups * splits
    programs = min(items, launch.bwd_programs or gradient_programs(d_state, launch, dtype, device))
    subs = -(-min(launch.chunk_size, length) // launch.bwd_steps)
    slots = subs if kept else subs + launch.bwd_steps
    return GradientPlan(
        launch,
        chunk_grads,
        (chunks * chunk_blocks,),
        (
            *dout[:2], *z_strides, *delta[:2], *C[:3], length, n_chunks, d_inner, d_state, group_channels,
            chunk_per_group, chunk_blocks,
        ),
        gradients,
        (programs,),
        (
            *inner[:2], *u[:2], *delta[:2], *B[:3], *C[:3], *gate, batch, length, n_chunks, d_inner,
            d_state, groups, group_channels, blocks_per_group, blocks_per_split, splits, partials, subs,
            items, programs,
        ),
        (partials, batch, length, groups, 2, memory_states(padded_state(d_state))),
        (programs, slots, padded_state(d_state), launch.block),
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _launchers(
    launch: ScanLaunch,
    d_state: int,
    dtype: torch.dtype,
    group_channels: int,
    softplus: bool,
    packed: bool,
    reverse: bool,
    wide: bool,
    chunk_brought: bool,
    chunk_copied: bool,
    brought: bool,
    copied: bool,
    vectors: bool,
    gated: bool,
) -> tuple[Launcher, Launcher]:
    """`chunk_grad_kernel` and `grad_kernel` with their constants."""
    both = {
        "SOFTPLUS": softplus,
        "PACKED": packed,
        "REVERSE": reverse,
        "WIDE": wide,
        "CHUNK": launch.chunk_size,
        "BLOCK_N": padded_state(d_state),
        "FULL_N": padded_state(d_state) == d_state,
        "num_warps": 1,
    }
    chunk = {
        "STEPS": launch.fwd_steps,
        **staging(
            d_state,
            launch.chunk_size,
            launch.fwd_block,
            launch.fwd_steps,
            rows=4 if gated else 3,
            row_bytes=dtype.itemsize,
        ),
        **bringing(d_state, launch.fwd_block, dtype, chunk_brought),
        **row_copies(dtype, launch.fwd_block, chunk_copied),
        **decay(d_state, launch.fwd_block, launch.polynomials),
        "BLOCK_D": launch.fwd_block,
        "FULL_D": group_channels % launch.fwd_block == 0,
        "maxnreg": launch.fwd_registers,
    }
    gradients = {
        "STEPS": launch.bwd_steps,
        **gradient_staging(d_state, launch, dtype),
        **bringing(d_state, launch.block, dtype, brought),
        **row_copies(dtype, launch.block, copied),
        **kept_states(d_state, launch.block),
        **channel_sum(d_state, launch.block, launch.bwd_steps, dtype, vectors),
        "BLOCK_D": launch.block,
        "FULL_D": group_channels % launch.block == 0,
        "maxnreg": launch.bwd_registers,
    }
    return Launcher(chunk_grad_kernel, both | chunk), Launcher(grad_kernel, both | gradients)


def gradient_stage(d_state: int) -> int:
    """Bytes of B and C that a gradient program stages: few, as it keeps states beside them."""
    return 2048 if d_state <= 16 else 4096


def more_bytes(d_state: int, launch: ScanLaunch) -> int:
    """Bytes of shared memory of a gradient program for sums over channels and for step sizes."""
    return sums_bytes(d_state, launch.block, launch.bwd_steps) + 4 * launch.block * launch.bwd_steps


def gradient_staging(d_state: int, launch: ScanLaunch, dtype: torch.dtype) -> dict[str, object]:
    """Constants of the gradient kernel for its shared memory."""
    return staging(
        d_state,
        launch.chunk_size,
        launch.block,
        launch.bwd_steps,
        rows=4,
        row_bytes=dtype.itemsize,
        kept=launch.bwd_steps,
        stage_bytes=gradient_stage(d_state),
        more=more_bytes(d_state, launch),
    )


def gradient_bytes(d_state: int, launch: ScanLaunch, dtype: torch.dtype) -> int:
    """Bytes of shared memory of a gradient program."""
    return more_bytes(d_state, launch) + shared_bytes(
        d_state,
        launch.chunk_size,
        launch.block,
        launch.bwd_steps,
        4,
        dtype.itemsize,
        launch.bwd_steps,
        gradient_stage(d_state),
    )


def gradient_programs(d_state: int, launch: ScanLaunch, dtype: torch.dtype, device: torch.device) -> int:
    """Programs of the gradient kernel that run at a time."""
    shared = gradient_bytes(d_state, launch, dtype)
    at_a_time = resident(launch.bwd_registers, shared, shared_memory(device))
    return multiprocessors(device) * at_a_time

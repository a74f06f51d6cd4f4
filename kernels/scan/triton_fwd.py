"""Triton forward of the selective scan: chunks of time in parallel, sequential inside a chunk.

1. `chunk_state_kernel`: each chunk entered with zero: the state it ends with and its sum of dt.
2. `triton_common.carry`: the state entering each chunk.
3. `output_kernel`: each chunk again with that state: outputs, with skip connection and gate.

Where the batch and the channels alone fill the GPU, or one chunk covers the sequence, `output_kernel` walks
through the whole sequence (SERIAL) and passes 1 and 2 fall away. Either way the states entering the chunks
are what the backward gets.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.scan.chunk_kernels import chunk_state_kernel
from ssm_modal.kernels.scan.decays import decay
from ssm_modal.kernels.scan.launch import (
    ScanLaunch,
    boundaries_shape,
    padded_state,
    scan_launch,
    shipped_launches,
)
from ssm_modal.kernels.scan.output_kernels import output_kernel
from ssm_modal.kernels.scan.prefetch import DTYPES, can_copy, row_copies
from ssm_modal.kernels.scan.staging import bringing, can_bring, row_bits, staging
from ssm_modal.kernels.scan.triton_common import (
    carry,
    last_contiguous,
    wide_offsets,
)
from ssm_modal.kernels.sequences import Sequences


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
    added: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selective scan (arXiv 2312.00752, algorithm 2) of validated arguments in Triton.

    u, delta, z: (batch, length, d_inner), B, C: (batch, length, groups, d_state), one dtype of fp32, bf16,
    fp16, any strides. A: (d_inner, d_state), D, delta_bias: (d_inner,), initial_state: (batch or sequences,
    d_inner, d_state), fp32. `launch` overrides the table of `launch.py` (the backward must be given the
    same). Returns out (batch, length, d_inner) in the dtype of u, the final state (batch or sequences,
    d_inner, d_state) fp32, of any strides, and the states entering the chunks, `boundaries_shape`, fp32, for
    `selective_scan_bwd`.

    added: contiguous, shape and dtype of u: the y of another scan, to which that of this one is added before
    the gate. The output is written over it; with `keep` the sum is, and the output is a new tensor.
    """
    shape = batch, length, d_inner = u.shape
    groups, d_state = B.shape[2], B.shape[3]
    rows = batch if seqs is None else seqs.n
    if u.numel() == 0:
        whole = (rows, d_inner, d_state)
        final = A.new_zeros(whole) if initial_state is None else initial_state.clone()
        lengths, size = None if seqs is None else seqs.lengths, None if launch is None else launch.chunk_size
        kept = boundaries_shape(batch, length, d_inner, d_state, groups, lengths, size)
        return u.new_empty(shape), final.contiguous(), A.new_empty(kept)
    if launch is None and seqs is not None:
        launch = scan_launch(batch, length, d_inner, groups, d_state, u.device, seqs)
    u, delta, A = last_contiguous(u), last_contiguous(delta), A.t().contiguous()
    B, C = last_contiguous(B), last_contiguous(C)
    low = u.data_ptr() | delta.data_ptr()
    z_strides = None
    if z is not None:
        z = last_contiguous(z)
        low |= z.data_ptr()
        z_strides = z.stride()
    if added is not None:
        low |= added.data_ptr()
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    initial = None if initial_state is None else initial_state.transpose(1, 2).contiguous()
    device = u.device
    plan = _plan(
        launch, device, u.dtype, shape, groups, d_state, u.stride(), delta.stride(), B.stride(), C.stride(),
        z_strides, low % 16, (B.data_ptr() | C.data_ptr()) % 16, delta_softplus, seqs is not None, reverse,
        added is not None,
    )  # fmt: skip
    launch = plan.launch
    table = None if seqs is None else seqs.chunks(launch.chunk_size)
    chunks = plan.chunks if table is None else table.n_chunks
    chunk_start, chunk_end = (None, None) if table is None else (table.start, table.end)
    out = u.new_empty(shape) if added is None or keep else added
    y = added if keep else None
    states = A.new_empty((chunks, d_state, d_inner))
    if launch.serial:
        final = A.new_empty((rows, d_state, d_inner))
        bounds: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if table is not None and seqs is not None:
            bounds = (seqs.cu_seqlens, seqs.cu_seqlens[1:], table.first)
        plan.outputs(
            (rows * plan.blocks,),
            (u, delta, A, B, C, D, z, delta_bias, added, y, out, states, initial, final, *bounds),
            plan.output_numbers,
        )
    else:
        sums = A.new_empty((chunks, d_inner))
        plan.chunk_states(
            (chunks * plan.blocks,),
            (u, delta, A, B, delta_bias, states, sums, chunk_start, chunk_end),
            plan.chunk_numbers,
        )
        final = carry(
            states,
            sums,
            A,
            initial,
            batch=batch,
            seqs=seqs,
            chunk_size=launch.chunk_size,
            run_length=launch.run_length,
            descending=reverse,
        )
        bounds = (chunk_start, chunk_end, None)
        plan.outputs(
            (chunks * plan.blocks,),
            (u, delta, A, B, C, D, z, delta_bias, added, y, out, states, None, None, *bounds),
            plan.output_numbers,
        )
    return out, final.transpose(1, 2), states


class _Plan(NamedTuple):
    """What a call's shapes, strides and alignment settle."""

    launch: ScanLaunch
    chunks: int
    """Chunks of a dense batch."""
    blocks: int
    """Channel blocks."""
    chunk_states: Launcher
    chunk_numbers: tuple[int, ...]
    outputs: Launcher
    output_numbers: tuple[int, ...]


@functools.lru_cache(maxsize=512)
def _plan(
    launch: ScanLaunch | None,
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
    groups: int,
    d_state: int,
    u: tuple[int, ...],
    delta: tuple[int, ...],
    B: tuple[int, ...],
    C: tuple[int, ...],
    z: tuple[int, ...] | None,
    low: int,
    low_matrices: int,
    softplus: bool,
    packed: bool,
    reverse: bool,
    added: bool,
) -> _Plan:
    """u, delta, B, C, z: strides. low: the low bits of the addresses of u, delta, z and `added`;
    low_matrices: of B and C. launch: None for the table's."""
    batch, length, d_inner = shape
    if launch is None:
        launch = scan_launch(batch, length, d_inner, groups, d_state, device)
    chunks = batch * -(-length // launch.chunk_size)
    group_channels = d_inner // groups
    blocks_per_group = -(-group_channels // launch.fwd_block)
    blocks = groups * blocks_per_group
    n_chunks = 0 if packed else chunks // batch
    shape_args = (length, n_chunks, d_inner, d_state, group_channels, blocks_per_group, blocks)
    z_strides = (0, 0) if z is None else z[:2]
    out = (length * d_inner, d_inner)
    size = dtype.itemsize
    for strides in (u, delta, z, (*out, 1) if added else None):
        low |= 0 if strides is None else row_bits(0, strides, size)
    low_matrices |= row_bits(row_bits(0, B, size), C, size)
    chunk_states, outputs = _launchers(
        launch,
        d_state,
        dtype,
        group_channels,
        softplus,
        packed,
        reverse,
        wide_offsets(launch.chunk_size, u[1], delta[1], B[1], C[1], z_strides[1], out[1]),
        can_bring(d_state, size, low_matrices),
        can_copy(launch.fwd_block, group_channels, size, low),
        added,
    )
    return _Plan(
        launch,
        chunks,
        blocks,
        chunk_states,
        (*u[:2], *delta[:2], *B[:3], *shape_args),
        outputs,
        (*u[:2], *delta[:2], *B[:3], *C[:3], *z_strides, *out, *shape_args),
    )


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
    brought: bool,
    copied: bool,
    added: bool,
) -> tuple[Launcher, Launcher]:
    """`chunk_state_kernel` and `output_kernel` with their constants."""
    constants = _constants(
        launch, d_state, dtype, group_channels, softplus, packed, reverse, wide, brought, copied, added
    )
    registers = launch.serial_registers if launch.serial else launch.fwd_registers
    states = decay(d_state, launch.fwd_block, launch.polynomials)
    outputs = decay(d_state, launch.fwd_block, launch.output_polynomials)
    return (
        Launcher(chunk_state_kernel, constants | states | {"maxnreg": launch.fwd_registers}),
        Launcher(output_kernel, constants | outputs | {"SERIAL": launch.serial, "maxnreg": registers}),
    )


def _constants(
    launch: ScanLaunch,
    d_state: int,
    dtype: torch.dtype,
    group_channels: int,
    softplus: bool,
    packed: bool,
    reverse: bool,
    wide: bool,
    brought: bool,
    copied: bool,
    added: bool,
) -> dict[str, object]:
    """What both kernels are compiled for."""
    block, rows, steps = launch.fwd_block, 3, launch.fwd_steps
    if added:
        rows = 4
        # Loaded into registers, a fourth row of as many steps would not fit.
        steps = steps if copied else max(1, steps // 2)
    return {
        "SOFTPLUS": softplus,
        "PACKED": packed,
        "REVERSE": reverse,
        "WIDE": wide,
        "CHUNK": launch.chunk_size,
        "STEPS": steps,
        **staging(d_state, launch.chunk_size, block, steps, rows=rows, row_bytes=dtype.itemsize),
        **bringing(d_state, block, dtype, brought),
        **row_copies(dtype, block, copied),
        "BLOCK_D": block,
        "BLOCK_N": padded_state(d_state),
        "FULL_D": group_channels % block == 0,
        "FULL_N": padded_state(d_state) == d_state,
        "num_warps": 1,
    }


def aot_cases(added: bool = False) -> list[AotCase]:
    """Both kernels at every row of the table in bf16; at d_state 16 more. added: with room for that row."""
    cases = []
    for d_state, launch in shipped_launches():
        variants = [("bf16", False)]
        if d_state == 16:
            variants += [("fp32", False), ("fp16", True)]
        for dtype, packed in variants:
            minor = d_state not in (16, 256)
            table = "*i64" if packed else None
            # Packed here stands for what is not whole and not aligned, too.
            brought = not packed and d_state * DTYPES[dtype].itemsize % 16 == 0
            constants = _constants(
                launch,
                d_state,
                DTYPES[dtype],
                2048 - packed,
                True,
                packed,
                packed,
                False,
                brought,
                not packed,
                added,
            )
            shared: dict[str, object] = {
                "u_ptr": f"*{dtype}",
                "delta_ptr": f"*{dtype}",
                "a_ptr": "*fp32",
                "b_ptr": f"*{dtype}",
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
                **{name: value for name, value in constants.items() if name != "num_warps"},
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
                args |= {"sums_ptr": "*fp32", **decay(d_state, launch.fwd_block, launch.polynomials)}
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
            args = shared | strides | decay(d_state, launch.fwd_block, launch.output_polynomials)
            args |= {
                "c_ptr": shared["b_ptr"],
                "skip_ptr": "*fp32",
                "z_ptr": f"*{dtype}",
                "added_ptr": None,
                "y_ptr": None,
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

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

import torch
import triton
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
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
from ssm_modal.kernels.scan.staging import bringing, can_bring, staging
from ssm_modal.kernels.scan.triton_common import (
    carry,
    last_contiguous,
    on_its_device,
    wide_offsets,
)
from ssm_modal.kernels.sequences import Sequences


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
    d_inner, d_state) fp32, of any strides, and the states entering the chunks, `boundaries_shape`, fp32, for
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
    B, C = last_contiguous(B), last_contiguous(C)
    n_chunks = 0 if seqs is not None else states.shape[0] // batch
    table = None if seqs is None else seqs.chunks(chunk_size)
    group_channels = d_inner // groups
    blocks_per_group = triton.cdiv(group_channels, launch.fwd_block)
    blocks = groups * blocks_per_group
    shape_args = (length, n_chunks, d_inner, d_state, group_channels, blocks_per_group, blocks)
    u_strides, delta_strides, b_strides = u.stride()[:2], delta.stride()[:2], B.stride()[:3]
    c_strides, z_strides = C.stride()[:3], (0, 0) if z is None else z.stride()[:2]
    out_strides = (length * d_inner, d_inner)
    times = (s[1] for s in (u_strides, delta_strides, b_strides, c_strides, z_strides, out_strides))
    options = _constants(
        launch,
        d_state,
        u.dtype,
        group_channels,
        delta_softplus,
        seqs is not None,
        reverse,
        wide_offsets(chunk_size, *times),
        can_bring(d_state, B, C),
        can_copy(launch.fwd_block, group_channels, u, delta, z),
    )
    chunk_start, chunk_end = (None, None) if table is None else (table.start, table.end)
    if launch.serial:
        items = rows
        final = torch.empty((rows, d_state, d_inner), dtype=torch.float32, device=u.device)
        bounds: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
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
            *u_strides,
            *delta_strides,
            *b_strides,
            *shape_args,
            maxnreg=launch.fwd_registers,
            **decay(d_state, launch.fwd_block, launch.polynomials),
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
        *u_strides,
        *delta_strides,
        *b_strides,
        *c_strides,
        *z_strides,
        *out_strides,
        *shape_args,
        SERIAL=launch.serial,
        maxnreg=launch.serial_registers if launch.serial else launch.fwd_registers,
        **decay(d_state, launch.fwd_block, launch.output_polynomials),
        **options,
    )
    return out, final.transpose(1, 2), states


@functools.lru_cache(maxsize=512)
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
) -> dict[str, object]:
    """What both kernels are compiled for, the same dict in every call."""
    block = launch.fwd_block
    return {
        "SOFTPLUS": softplus,
        "PACKED": packed,
        "REVERSE": reverse,
        "WIDE": wide,
        "CHUNK": launch.chunk_size,
        "STEPS": launch.fwd_steps,
        **staging(d_state, launch.chunk_size, block, launch.fwd_steps, rows=3, row_bytes=dtype.itemsize),
        **bringing(d_state, block, dtype, brought),
        **row_copies(dtype, block, copied),
        "BLOCK_D": block,
        "BLOCK_N": padded_state(d_state),
        "FULL_D": group_channels % block == 0,
        "FULL_N": padded_state(d_state) == d_state,
        "num_warps": 1,
    }


def aot_cases() -> list[AotCase]:
    """Both kernels at every row of the table in bf16; at d_state 16 more."""
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

"""Triton backward of the selective scan: chunks of time in parallel, from the states saved at their borders.

With g_t the gradient of the loss in h_t, dy_t that in the output before the gate and a_t = exp(dt_t A):

    g_t  = C_t dy_t + a_{t+1} g_{t+1}
    dB_t = sum over d of g_t dt_t u_t          dC_t  = sum over d of h_t dy_t
    du_t = dt_t <g_t, B_t> + D dy_t            ddt_t = u_t <g_t, B_t> + <g_t a_t h_{t-1}, A>
    dA   = sum over t of g_t a_t h_{t-1} dt_t

1. `chunk_grad_kernel`: what each chunk adds to the gradient of the state entering it, and its sum of dt.
2. `triton_common.carry`, from the last chunk to the first: the gradient of the state leaving each chunk.
3. `grad_kernel`: as many programs as run at a time take (chunk, channel block) in turn. A chunk sweeps
   forward from its saved state and leaves every STEPS-th state in a scratch that stays in the second-level
   cache; then, from the last STEPS steps to the first, the states are rebuilt and kept in shared memory, and
   the gradients taken. The sums over channels for dB and dC are those of `channel_sum.py`.

Nothing is divided by a decay. dA, dD and the bias come as partial sums over chunks, added up afterwards. dB
and dC are added to one fp32 buffer by all programs, in any order; where torch asks for deterministic
algorithms, a program takes several channel blocks of its chunk one after another and adds to a buffer of its
own, and the buffers are added up in order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.scan.channel_sum import channel_sum, in_order, memory_states, sums_bytes
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
    shipped_launches,
)
from ssm_modal.kernels.scan.prefetch import DTYPES, can_copy, row_copies
from ssm_modal.kernels.scan.staging import bringing, can_bring, shared_bytes, staging
from ssm_modal.kernels.scan.triton_common import (
    carry,
    last_contiguous,
    on_its_device,
    wide_offsets,
)
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.kernels.triton_sums import column_sums


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
    B, C = last_contiguous(B), last_contiguous(C)
    chunks = boundaries.shape[0]
    n_chunks = 0 if seqs is not None else chunks // batch
    table = None if seqs is None else seqs.chunks(chunk_size)
    start, end = (None, None) if table is None else (table.start, table.end)
    group_channels = d_inner // groups
    z_strides = (0, 0) if z is None else (z.stride(0), z.stride(1))
    rows_apart = [x.stride(1) for x in (u, delta, dout, B, C, u if z is None else z)]
    rows_apart += [d_inner]
    options = {
        "SOFTPLUS": delta_softplus,
        "PACKED": seqs is not None,
        "REVERSE": reverse,
        "WIDE": wide_offsets(chunk_size, *rows_apart),
        "CHUNK": chunk_size,
        "BLOCK_N": padded_state(d_state),
        "FULL_N": padded_state(d_state) == d_state,
    }

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    grads, sums = empty(chunks, d_state, d_inner), empty(chunks, d_inner)
    blocks_per_group = triton.cdiv(group_channels, launch.fwd_block)
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
        **staging(
            d_state, chunk_size, launch.fwd_block, launch.fwd_steps, rows=3, row_bytes=u.element_size()
        ),
        **bringing(d_state, launch.fwd_block, C.dtype, can_bring(d_state, C)),
        **row_copies(u.dtype, launch.fwd_block, can_copy(launch.fwd_block, group_channels, dout, delta, z)),
        BLOCK_D=launch.fwd_block,
        FULL_D=group_channels % launch.fwd_block == 0,
        num_warps=1,
        maxnreg=launch.fwd_registers,
        **decay(d_state, launch.fwd_block, launch.polynomials),
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
    given = (D is not None) + (delta_bias is not None)
    vectors = empty(chunks, given, d_inner)
    dskip = None if D is None else vectors[:, 0]
    dbias = None if delta_bias is None else vectors[:, -1]
    blocks_per_group = triton.cdiv(group_channels, launch.block)
    deterministic = torch.are_deterministic_algorithms_enabled()
    blocks_per_split = triton.cdiv(blocks_per_group, launch.bwd_splits) if deterministic else 1
    splits = triton.cdiv(blocks_per_group, blocks_per_split)
    partials = splits if deterministic else 1
    partial = torch.zeros(
        (partials, batch, length, groups, 2, memory_states(padded_state(d_state))),
        dtype=torch.float32,
        device=u.device,
    )
    items = chunks * groups * splits
    programs = min(items, launch.bwd_programs or gradient_programs(d_state, launch, u))
    subs = triton.cdiv(min(chunk_size, length), launch.bwd_steps)
    kept = kept_states(d_state, launch.block)
    slots = subs if kept["KEPT"] else subs + launch.bwd_steps
    scratch = empty(programs, slots, padded_state(d_state), launch.block)
    grad_kernel[(programs,)](
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
        partial,
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
        partials,
        subs,
        items,
        programs,
        STEPS=launch.bwd_steps,
        **gradient_staging(d_state, launch, u.dtype),
        **bringing(d_state, launch.block, B.dtype, can_bring(d_state, B, C)),
        **row_copies(u.dtype, launch.block, can_copy(launch.block, group_channels, u, delta, dout, z)),
        **kept,
        **channel_sum(d_state, launch.block, launch.bwd_steps, u.dtype, adds_vectors(u.device)),
        BLOCK_D=launch.block,
        FULL_D=group_channels % launch.block == 0,
        num_warps=1,
        maxnreg=launch.bwd_registers,
        **options,
    )
    both = partial[0] if partials == 1 else partial.sum(0)
    both = in_order(both[..., : padded_state(d_state)], launch.block)[..., :d_state]
    dA, dD, ddelta_bias = empty(d_inner, d_state), None, None
    column_sums(grads, dA, None)
    if D is not None:
        dD = empty(d_inner)
    if delta_bias is not None:
        ddelta_bias = empty(d_inner)
    if given:
        column_sums(vectors, (ddelta_bias if dD is None else dD)[:, None], ddelta_bias if given == 2 else None)
    return (
        du,
        ddelta,
        dA,
        both[..., 0, :].to(dtype_b).contiguous(),
        both[..., 1, :].to(dtype_c).contiguous(),
        dD,
        dz,
        ddelta_bias,
        None if initial_state is None else dinitial.transpose(1, 2).contiguous(),
    )


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


def gradient_programs(d_state: int, launch: ScanLaunch, u: Tensor) -> int:
    """Programs of the gradient kernel that run at a time."""
    shared = gradient_bytes(d_state, launch, u.dtype)
    at_a_time = resident(launch.bwd_registers, shared, shared_memory(u.device))
    return multiprocessors(u.device) * at_a_time


def aot_cases() -> list[AotCase]:
    """Both kernels at every row of the table in bf16; at d_state 16 more."""
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
            args |= dict.fromkeys(("b_ptr", "c_ptr"), f"*{dtype}")
            args |= dict.fromkeys(("a_ptr", "bias_ptr", "grads_ptr", "sums_ptr"), "*fp32")
            args |= {"start_ptr": table, "end_ptr": table, **strides}
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
                **staging(
                    d_state,
                    launch.chunk_size,
                    launch.fwd_block,
                    launch.fwd_steps,
                    rows=3,
                    row_bytes=DTYPES[dtype].itemsize,
                ),
                **bringing(
                    d_state,
                    launch.fwd_block,
                    DTYPES[dtype],
                    not packed and d_state * DTYPES[dtype].itemsize % 16 == 0,
                ),
                **row_copies(DTYPES[dtype], launch.fwd_block, not packed),
                **decay(d_state, launch.fwd_block, launch.polynomials),
                "BLOCK_D": launch.fwd_block,
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
            args |= dict.fromkeys(("skip_ptr", "states_ptr", "scratch_ptr", "sums_ptr"), "*fp32")
            args |= dict.fromkeys(("dskip_ptr", "dbias_ptr"), "*fp32")
            args |= dict.fromkeys(("du_ptr", "ddelta_ptr", "dz_ptr"), f"*{dtype}")
            args |= {
                "blocks_per_split": 1,
                "splits": 64,
                "partials": 1,
                "subs": launch.chunk_size // launch.bwd_steps,
                "items": 65536,
                "programs": 1584,
                "STEPS": launch.bwd_steps,
                "BLOCK_D": launch.block,
                **gradient_staging(d_state, launch, DTYPES[dtype]),
                **bringing(
                    d_state,
                    launch.block,
                    DTYPES[dtype],
                    not packed and d_state * DTYPES[dtype].itemsize % 16 == 0,
                ),
                **row_copies(DTYPES[dtype], launch.block, not packed),
                **kept_states(d_state, launch.block),
                **channel_sum(d_state, launch.block, launch.bwd_steps, DTYPES[dtype], vectors=True),
            }
            own = {p.name: args[p.name] for p in grad_kernel.params}
            cases.append(
                AotCase(grad_kernel, label, own, num_warps=1, maxnreg=launch.bwd_registers, minor=minor)
            )
    return cases

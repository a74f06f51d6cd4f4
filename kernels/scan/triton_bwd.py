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
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.scan.channel_sum import channel_sum
from ssm_modal.kernels.scan.chunk_kernels import chunk_grad_kernel
from ssm_modal.kernels.scan.decays import decay
from ssm_modal.kernels.scan.grad_kernels import grad_kernel
from ssm_modal.kernels.scan.gradient_launch import gradient_plan, gradient_staging
from ssm_modal.kernels.scan.keeping import kept_states
from ssm_modal.kernels.scan.launch import (
    ScanLaunch,
    padded_state,
    scan_launch,
    shipped_launches,
)
from ssm_modal.kernels.scan.prefetch import DTYPES, row_copies
from ssm_modal.kernels.scan.staging import bringing, staging
from ssm_modal.kernels.scan.triton_common import (
    carry,
    last_contiguous,
)
from ssm_modal.kernels.scan.triton_totals import matrix_gradients, parameter_sums
from ssm_modal.kernels.sequences import Sequences


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
    y: Tensor | None = None,
    dy: Tensor | None = None,
    added: Tensor | None = None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:
    """Gradients of `selective_scan_fwd`, to the same arguments and the same `launch`.

    dout: (batch, length, d_inner), dtype of u; dfinal_state: (batch or sequences, d_inner, d_state) fp32 or
    None for zeros; boundaries: the third result of the forward. Returns du, ddelta, dA, dB, dC, dD, dz,
    ddelta_bias, dinitial_state, each contiguous, of its argument's shape and dtype, None where that argument
    was None.

    y: contiguous, shape and dtype of u: what z gated, where that is not this scan's y alone. dy, likewise,
    with y: becomes the gradient in y. added: likewise, without z: the du of another scan of the same u; that
    of this one is added to it, and it is returned as du.
    """
    shape = batch, length, d_inner = u.shape
    groups, d_state = B.shape[2], B.shape[3]
    exit_grad = None if dfinal_state is None else dfinal_state.transpose(1, 2).contiguous()
    if u.numel() == 0:
        dinitial = None
        if initial_state is not None:
            dinitial = (
                initial_state.new_zeros(initial_state.shape)
                if dfinal_state is None
                else dfinal_state.clone().contiguous()
            )
        plain = [None if x is None else x.new_zeros(x.shape) for x in (u, delta, A, B, C, D, z, delta_bias)]
        return (*plain, dinitial)  # type: ignore[return-value]
    if launch is None and seqs is not None:
        launch = scan_launch(batch, length, d_inner, groups, d_state, u.device, seqs)

    u, delta, dout, A = last_contiguous(u), last_contiguous(delta), last_contiguous(dout), A.t().contiguous()
    B, C = last_contiguous(B), last_contiguous(C)
    low = delta.data_ptr() | dout.data_ptr()
    z_strides = None
    if z is not None:
        z = last_contiguous(z)
        low |= z.data_ptr()
        z_strides = z.stride()
    for x in (y, dy, added):
        low |= 0 if x is None else x.data_ptr()
    D = None if D is None else D.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    device, dtype = u.device, u.dtype
    deterministic = torch.are_deterministic_algorithms_enabled()
    plan = gradient_plan(
        launch, device, dtype, shape, groups, d_state, boundaries.shape[0], u.stride(), delta.stride(),
        dout.stride(), B.stride(), C.stride(), z_strides, u.data_ptr() % 16, low % 16, B.data_ptr() % 16,
        C.data_ptr() % 16, delta_softplus, seqs is not None, reverse, deterministic,
        y is not None, added is not None,
    )  # fmt: skip
    launch, chunks = plan.launch, boundaries.shape[0]
    table = None if seqs is None else seqs.chunks(launch.chunk_size)
    start, end = (None, None) if table is None else (table.start, table.end)

    grads, sums = A.new_empty((chunks, d_state, d_inner)), A.new_empty((chunks, d_inner))
    dz = None if z is None else u.new_empty(shape)
    gated = None if y is None else dz
    plan.chunk_grads(
        plan.chunk_grid,
        (dout, z, y, delta, A, C, delta_bias, grads, sums, dy, gated, start, end),
        plan.chunk_numbers,
    )
    dinitial = carry(
        grads,
        sums,
        A,
        exit_grad,
        batch=batch,
        seqs=seqs,
        chunk_size=launch.chunk_size,
        run_length=launch.run_length,
        descending=not reverse,
    )

    du = u.new_empty(shape) if added is None else added
    ddelta = u.new_empty(shape)
    # With dy the gradients know of no gate.
    inner, gate, dgate = (dout, z, dz) if dy is None else (dy, None, None)
    dskip = None if D is None else sums
    dbias = None if delta_bias is None else A.new_empty((chunks, d_inner))
    partial = A.new_zeros(plan.sums_shape)
    scratch = A.new_empty(plan.scratch_shape)
    plan.gradients(
        plan.grid,
        (
            inner, u, delta, A, B, C, D, gate, delta_bias, boundaries, grads, added, scratch, du, ddelta,
            partial, dskip, dgate, dbias, start, end,
        ),
        plan.numbers,
    )  # fmt: skip
    dA, dD, ddelta_bias = parameter_sums(grads, dskip, dbias)
    dB, dC = matrix_gradients(partial, d_state, launch.block, dtype)
    dinitial = None if initial_state is None else dinitial.transpose(1, 2).contiguous()
    return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial


def aot_cases(gated: bool = False) -> list[AotCase]:
    """Both kernels at every row of the table in bf16; at d_state 16 more. gated: the first has room for y."""
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
                    rows=4 if gated else 3,
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
            args |= dict.fromkeys(("y_ptr", "dy_ptr", "dz_ptr", "added_ptr"))
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

"""The end of the Triton backward of the selective scan: sums over chunks, and dB and dC in their dtype.

`grad_kernel` leaves one partial sum a chunk of dA, dD and the bias's gradient, and fp32 sums of dB and dC, as
they stand in memory. In torch that is nine small kernels; here it is two launches.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.scan.channel_sum import memory_states
from ssm_modal.kernels.scan.launch import padded_state
from ssm_modal.kernels.scan.staging import WARP
from ssm_modal.kernels.triton_stores import store_held

# A program adds up this many channels, in tiles of at most so many chunks.
CHANNELS, MOST_CHUNKS = 32, 128
# Elements of a program that turns dB and dC.
ELEMENTS, WARPS = 1024, 4


@triton.jit
def _add_up(at, to, chunks, apart, c, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store at `to` the sum over chunks of the numbers at `at`, `apart` from chunk to chunk; fp32."""
    r = tl.arange(0, ROWS)
    at += c[None, :] + r[:, None].to(tl.int64) * apart
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    i = chunks * 0
    while i < chunks:
        sums += tl.load(at, mask=mask[None, :] & (i + r < chunks)[:, None], other=0.0)
        at += ROWS * apart.to(tl.int64)
        i += ROWS
    store_held(to, tl.sum(sums, 0), mask)


@triton.jit(do_not_specialize=["chunks", "d_inner", "d_state"])
def parameter_sums_kernel(
    grads,  # (chunks, d_state, d_inner) fp32
    dskips,  # (chunks, d_inner) fp32 or None
    dbiases,  # (chunks, d_inner) fp32 or None
    dA,  # (d_inner, d_state) fp32
    dD,  # (d_inner,) fp32 or None
    dbias,  # (d_inner,) fp32 or None
    chunks,
    d_inner,
    d_state,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a channel block and state; behind the states D and the bias, where they are."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1)
    mask = c < d_inner
    if plane < d_state:
        to = dA + c.to(tl.int64) * d_state + plane
        _add_up(grads + plane * d_inner, to, chunks, d_state * d_inner, c, mask, ROWS, BLOCK)
    # One is known when the kernel is compiled, the other is not.
    if dskips is not None:  # noqa: SIM102
        if plane == d_state:
            _add_up(dskips, dD + c, chunks, d_inner, c, mask, ROWS, BLOCK)
    if dbiases is not None:  # noqa: SIM102
        if plane == d_state + 1:
            _add_up(dbiases, dbias + c, chunks, d_inner, c, mask, ROWS, BLOCK)


@functools.cache
def _parameter_launcher(rows: int) -> Launcher:
    constants = {"ROWS": rows, "BLOCK": CHANNELS, "num_warps": max(1, rows // 32)}
    return Launcher(parameter_sums_kernel, constants)


def parameter_sums(
    grads: Tensor, dskips: Tensor | None, dbiases: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dA (d_inner, d_state), dD and the bias's gradient (d_inner,), added up over chunks in a fixed order.

    grads: (chunks, d_state, d_inner), dskips, dbiases: (chunks, d_inner), fp32, contiguous.
    """
    chunks, d_state, d_inner = grads.shape
    dA = grads.new_empty((d_inner, d_state))
    dD = None if dskips is None else grads.new_empty((d_inner,))
    dbias = None if dbiases is None else grads.new_empty((d_inner,))
    _parameter_launcher(_rows(chunks))(
        (-(-d_inner // CHANNELS), d_state + 2),
        (grads, dskips, dbiases, dA, dD, dbias),
        (chunks, d_inner, d_state),
    )
    return dA, dD, dbias


def _rows(chunks: int) -> int:
    """Chunks of a tile."""
    return max(4, min(MOST_CHUNKS, 1 << (chunks - 1).bit_length()))


@triton.jit(do_not_specialize=["positions", "partials", "d_state"])
def matrix_gradients_kernel(
    sums,  # (partials, positions, 2, MEMORY) fp32
    dB,  # (positions, d_state)
    dC,  # (positions, d_state)
    positions,
    partials,
    d_state,
    SHARE: tl.constexpr,
    MEMORY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program a tile [ROWS, BLOCK_N] of positions and states of dB (axis 1: 0) or dC (1)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    which = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    # `grad_kernel` keeps the states of a lane together.
    place = n
    if BLOCK_N > SHARE:
        place = n % SHARE * (BLOCK_N // SHARE) + n // SHARE
    mask = (row < positions)[:, None] & (n < d_state)[None, :]
    at = sums + (row * 2 + which)[:, None] * MEMORY + place[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    i = partials * 0 + 1
    while i < partials:
        at += positions.to(tl.int64) * (2 * MEMORY)
        total += tl.load(at, mask=mask, other=0.0)
        i += 1
    to = row[:, None] * d_state + n[None, :]
    if which == 0:
        tl.store(dB + to, total.to(dB.dtype.element_ty), mask=mask)
    else:
        tl.store(dC + to, total.to(dC.dtype.element_ty), mask=mask)


@functools.cache
def _matrix_launcher(padded: int, block: int) -> Launcher:
    return Launcher(matrix_gradients_kernel, _matrix_constants(padded, block) | {"num_warps": WARPS})


def _matrix_constants(padded: int, block: int) -> dict[str, int]:
    return {
        "SHARE": WARP // block,
        "MEMORY": memory_states(padded),
        "BLOCK_N": padded,
        "ROWS": max(1, ELEMENTS // padded),
    }


def matrix_gradients(sums: Tensor, d_state: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dB and dC (batch, length, groups, d_state) in `dtype`, contiguous.

    sums: (partials, batch, length, groups, 2, memory states) fp32, contiguous, as tiles of `block` channels
    leave them.
    """
    partials, batch, length, groups, _, _ = sums.shape
    positions = batch * length * groups
    dB = torch.empty((batch, length, groups, d_state), dtype=dtype, device=sums.device)
    dC = torch.empty((batch, length, groups, d_state), dtype=dtype, device=sums.device)
    launcher = _matrix_launcher(padded_state(d_state), block)
    launcher((-(-positions // launcher.constants["ROWS"]), 2), (sums, dB, dC), (positions, partials, d_state))
    return dB, dC


def aot_cases() -> list[AotCase]:
    """Few chunks and many; lanes that hold a channel each, and that share one."""
    cases = []
    for rows in (4, MOST_CHUNKS):
        given = dict.fromkeys(("grads", "dskips", "dbiases", "dA", "dD", "dbias"), "*fp32")
        given |= {"chunks": 8192, "d_inner": 2048, "d_state": 16, "ROWS": rows, "BLOCK": CHANNELS}
        cases.append(AotCase(parameter_sums_kernel, f"tiles of {rows}", given, num_warps=max(1, rows // 32)))
    for d_state, block, dtype in ((16, 32, "bf16"), (64, 8, "fp32"), (256, 2, "bf16")):
        given = {"sums": "*fp32", "dB": f"*{dtype}", "dC": f"*{dtype}", "positions": 65536, "partials": 1}
        given |= {"d_state": d_state, **_matrix_constants(d_state, block)}
        cases.append(AotCase(matrix_gradients_kernel, f"N{d_state} {dtype}", given, num_warps=WARPS))
    return cases

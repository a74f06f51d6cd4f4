"""Rows of B and C staged in shared memory by the one warp of a program.

All lanes of a warp need the same row of B and C at every step. Read from device memory, each row costs the
latency of the second-level cache at the step that uses it; so a program brings the rows of STAGE steps at a
time into shared memory, in fp32, and reads them back by broadcast.

Triton has no word for shared memory, so this is PTX; under the interpreter and on other makes of GPU rows are
loaded as they are used. What the assembly takes for granted of a tile's layout (`state_tile` in
`triton_common.py`): register i of a lane is state i * Q + lane // BLOCK_D, where Q = 32 / BLOCK_D lanes share
a channel. A staged row is stored so that the states of one lane stand together.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ssm_modal.kernels.scan.launch import padded_state
from ssm_modal.kernels.scan.triton_common import row_offset
from ssm_modal.kernels.triton_math import NVIDIA

WARP = 32

# Bytes of shared memory that the rows of B and C of one program may take.
STAGE_BYTES = 8192
# Numbers of B, and as many of C, brought in together.
PIECE_NUMBERS = tl.constexpr(128)

# Kernels must not know that these are multiples of 16: lanes then take neighbouring numbers one by one and
# store them to different banks, where wide loads would make eight lanes share each bank.
STAGED_STRIDES = ["b_time", "c_time"]


@functools.cache
def staging(
    d_state: int,
    chunk_size: int,
    block: int,
    steps: int,
    *,
    rows: int,
    row_bytes: int,
    kept: int = 0,
    stage_bytes: int = STAGE_BYTES,
    more: int = 0,
) -> dict[str, object]:
    """Constants of the kernels: STAGE, RESERVE, READ and READ_CONSTRAINTS, of a program's shared memory.

    In order: rows of B and C, at most `stage_bytes` of them; `kept` tiles of states; two buffers of
    `steps` rows each of `rows` inputs of row_bytes a channel; `more` bytes. steps: those that a kernel takes
    together.
    """
    block_n = padded_state(d_state)
    stage = stage_steps(d_state, chunk_size, steps, stage_bytes)
    read, constraints = read_assembly(max(1, block_n * block // WARP))
    size = shared_bytes(d_state, chunk_size, block, steps, rows, row_bytes, kept, stage_bytes) + more
    return {
        "STAGE": stage,
        "RESERVE": f"{{ .shared .align 16 .b8 staged[{size}]; mov.u32 $0, staged; }}",
        "READ": read,
        "READ_CONSTRAINTS": constraints,
    }


def stage_steps(d_state: int, chunk_size: int, steps: int, stage_bytes: int) -> int:
    """Steps of a stage of B and C: a multiple of `steps`, at most a chunk."""
    stage = steps
    while 2 * stage <= chunk_size and 2 * stage * 8 * padded_state(d_state) <= stage_bytes:
        stage *= 2
    return stage


def shared_bytes(
    d_state: int,
    chunk_size: int,
    block: int,
    steps: int,
    rows: int,
    row_bytes: int,
    kept: int,
    stage_bytes: int,
) -> int:
    """Bytes of shared memory that a program takes; the arguments of `staging`."""
    block_n = padded_state(d_state)
    staged = stage_steps(d_state, chunk_size, steps, stage_bytes) * 8 * block_n
    tiles = kept * max(WARP, block_n * block) * 4
    return staged + tiles + 2 * rows * steps * block * row_bytes


def pieces(registers: int) -> tuple[int, str]:
    """Numbers that a lane moves at a time, and PTX's word for it."""
    wide = next(w for w in (4, 2, 1) if registers % w == 0)
    return wide, "" if wide == 1 else f".v{wide}"


def operands(first: int, count: int) -> str:
    names = ", ".join(f"${j}" for j in range(first, first + count))
    return names if count == 1 else f"{{{names}}}"


@functools.cache
def read_assembly(registers: int) -> tuple[str, str]:
    """PTX and constraints that read consecutive numbers at the address in the first input."""
    wide, vector = pieces(registers)
    lines = [
        f"ld.shared{vector}.f32 {operands(i, wide)}, [${registers} + {4 * i}];"
        for i in range(0, registers, wide)
    ]
    return " ".join(lines), ",".join(["=f"] * registers + ["r"] * registers)


@functools.cache
def bring_assembly(block_n: int, block: int, dtype: torch.dtype) -> tuple[str, int]:
    """PTX that brings 16 bytes of B or C in and stores them in fp32, and the numbers in them.

    Inputs: the address in shared memory, the one in device memory, a flag, 0 where zeros are to be stored.
    """
    numbers = 16 // dtype.itemsize
    share = WARP // block
    lines = [
        ".reg .b32 w<4>, x<8>;",
        ".reg .b16 a, b;",
        ".reg .pred p;",
        "setp.ne.u32 p, $3, 0;",
        *(f"mov.b32 w{i}, 0;" for i in range(4)),
        "@p ld.global.v4.b32 {w0, w1, w2, w3}, [$2];",
    ]
    for i in range(numbers):
        word, half = f"w{i * dtype.itemsize // 4}", i % 2
        if dtype == torch.float32:
            lines += [f"mov.b32 x{i}, {word};"]
        elif dtype == torch.bfloat16:
            lines += [f"and.b32 x{i}, {word}, 0xffff0000;" if half else f"shl.b32 x{i}, {word}, 16;"]
        else:
            lines += [f"mov.b32 {{a, b}}, {word};", f"cvt.f32.f16 x{i}, {'b' if half else 'a'};"]
    if share == 1:
        lines += [
            f"st.shared.v4.b32 [$1 + {4 * i}], {{x{i}, x{i + 1}, x{i + 2}, x{i + 3}}};"
            for i in range(0, numbers, 4)
        ]
    else:
        each = block_n // share
        lines += [
            f"st.shared.b32 [$1 + {4 * (i % share * each + i // share)}], x{i};" for i in range(numbers)
        ]
    return "{ " + " ".join([*lines, "mov.u32 $0, 0;"]) + " }", numbers


def can_bring(d_state: int, itemsize: int, bits: int) -> bool:
    """Whether the rows of B or C come whole in pieces of 16 aligned bytes; bits: their `row_bits`."""
    whole = padded_state(d_state) == d_state and d_state * itemsize % 16 == 0
    return NVIDIA.value and whole and not bits % 16


@functools.cache
def bringing(d_state: int, block: int, dtype: torch.dtype, brought: bool) -> dict[str, object]:
    """Constants BRING and BROUGHT of kernels that stage B or C; `brought`: 16 bytes at a time."""
    code = bring_assembly(d_state, block, dtype) if brought else (None, 1)
    return dict(zip(("BRING", "BROUGHT"), code))


def row_bits(address: int, strides: Sequence[int], itemsize: int) -> int:
    """A number that a power of two divides where it divides the address of every row, in bytes.

    address: of the first row, or what is left of it. strides: in elements, the last one of 1.
    """
    for stride in strides[:-1]:
        address |= stride * itemsize
    return address


@triton.jit
def stage_base(RESERVE: tl.constexpr):
    """The address of the reserved shared memory; once a kernel."""
    if NVIDIA:
        return tl.inline_asm_elementwise(RESERVE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return 0


@triton.jit
def stage_wait():
    """All lanes of the warp are here, and see what the others stored in shared memory."""
    if NVIDIA:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def stage_rows(
    base,
    b_row,
    c_row,
    first,
    count,
    step,
    b_stride,
    c_stride,
    d_state,
    BRING: tl.constexpr,
    BROUGHT: tl.constexpr,
    WIDE: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):
    """Store steps first ... first + STAGE - 1 of B, and behind them of C, in fp32 at `base`.

    Those AHEAD steps further are then asked for, to be near when their turn comes: a hint, given where rows
    come 16 bytes at a time and AHEAD is not 0.

    b_row, c_row: pointers to step 0, c_row None for B alone; step: 1 or -1. Rows from step `count` on are 0.
    """
    if NVIDIA:
        stage_wait()
        if BRING is not None:
            _bring_rows(
                base,
                b_row,
                first,
                count,
                step,
                b_stride,
                BRING,
                BROUGHT,
                WIDE,
                STAGE,
                BLOCK_N,
                BLOCK_D,
                AHEAD,
            )
            if c_row is not None:
                _bring_rows(
                    base + STAGE * BLOCK_N * 4, c_row, first, count, step, c_stride, BRING, BROUGHT, WIDE,
                    STAGE, BLOCK_N, BLOCK_D, AHEAD,
                )  # fmt: skip
        else:
            # Few rows at a time: every load of a piece takes registers for its address.
            if STAGE * BLOCK_N <= PIECE_NUMBERS:
                PIECE: tl.constexpr = STAGE
            elif BLOCK_N <= PIECE_NUMBERS:
                PIECE: tl.constexpr = PIECE_NUMBERS // BLOCK_N
            else:
                PIECE: tl.constexpr = 1
            for piece in range(0, STAGE, PIECE):
                j = piece + tl.arange(0, PIECE)[:, None]
                n = tl.arange(0, BLOCK_N)[None, :]
                at = (first + j) * step
                mask = (n < d_state) & (first + j < count)
                b = tl.load(b_row + row_offset(at, b_stride, n, WIDE), mask=mask, other=0.0)
                if c_row is not None:
                    c = tl.load(c_row + row_offset(at, c_stride, n, WIDE), mask=mask, other=0.0)
                place = base + _inside(j, n, BLOCK_N, BLOCK_D)
                _store(place, b.to(tl.float32))
                if c_row is not None:
                    _store(place + STAGE * BLOCK_N * 4, c.to(tl.float32))
        stage_wait()


@triton.jit
def _bring_rows(
    base,
    row,
    first,
    count,
    step,
    stride,
    BRING: tl.constexpr,
    BROUGHT: tl.constexpr,
    WIDE: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    A_ROW: tl.constexpr = BLOCK_N // BROUGHT
    PIECES: tl.constexpr = STAGE * A_ROW if STAGE * A_ROW < 32 else 32
    for piece in range(0, STAGE * A_ROW, PIECES):
        i = piece + tl.arange(0, PIECES)
        j = i // A_ROW
        n = i % A_ROW * BROUGHT
        source = row + row_offset((first + j) * step, stride, n, WIDE)
        tl.inline_asm_elementwise(
            BRING,
            "=r,r,l,r",
            [
                base + _inside(j, n, BLOCK_N, BLOCK_D),
                source.to(tl.int64, bitcast=True),
                (first + j < count).to(tl.int32),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        if AHEAD != 0:
            next_row = tl.maximum(tl.minimum(first + AHEAD + j, count - 1), 0)
            coming = row + row_offset(next_row * step, stride, n, WIDE)
            tl.inline_asm_elementwise(
                "prefetch.global.L1 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [coming.to(tl.int64, bitcast=True)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def _inside(j, n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where state n of row j stands, in bytes: the states of one lane together."""
    Q: tl.constexpr = 32 // BLOCK_D
    R: tl.constexpr = BLOCK_N // Q
    return (j * BLOCK_N + (n % Q) * R + n // Q) * 4


@triton.jit
def _store(place, values):
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;",
        "=r,r,f",
        [place, values],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def states_row(
    base,
    j,
    row,
    at,
    stride,
    n,
    d,
    mask_n,
    READ: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row j of those staged at `base`, in fp32, as a tile [BLOCK_N, BLOCK_D] or [BLOCK_N, 1].

    Where nothing is staged, row `at` counted from the row at `row`.
    """
    if NVIDIA:
        R: tl.constexpr = BLOCK_N * BLOCK_D // 32
        # The first register of a lane says where its states begin.
        place = base + _inside(j, n[:, None], BLOCK_N, BLOCK_D) + d[None, :] * 0
        return tl.inline_asm_elementwise(READ, CONSTRAINTS, [place], dtype=tl.float32, is_pure=False, pack=R)
    else:
        return tl.load(row + at.to(tl.int64) * stride + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]

"""Rows of u, delta, z and the like on their way to shared memory while the warp works on those before.

A program of one warp walks through time and needs a row of each of several inputs at every step. Loaded when
they are needed, a warp waits for device memory at every block of steps; loaded a block ahead into registers,
they take registers. So they are copied asynchronously (`cp.async`), a block of steps ahead, into two buffers
that take turns. Every place is written by one lane.

The constants ROW_... say how; ROW_READ is None where rows are not copied: under the interpreter, on other
makes of GPU, and where rows are not aligned. Then `load_rows` loads a block of them when it is needed.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ssm_modal.kernels.scan.triton_common import load_row, row_offset
from ssm_modal.kernels.triton_math import NVIDIA

READ = {
    torch.bfloat16: "{ .reg .b32 w; ld.shared.u16 w, [$1]; shl.b32 w, w, 16; mov.b32 $0, w; }",
    torch.float16: "{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.f32.f16 $0, h; }",
    torch.float32: "ld.shared.f32 $0, [$1];",
}

# Triton's names of the dtypes.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@functools.cache
def row_copies(dtype: torch.dtype, block: int, copied: bool) -> dict[str, object]:
    """Constants of the kernels for rows of `block` channels, copied ahead or not."""
    size = min(16, block * dtype.itemsize)
    cache = "cg" if size == 16 else "ca"
    return {
        "ROW_READ": READ[dtype] if copied else None,
        "ROW_COPY": (
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; "
            f"@p cp.async.{cache}.shared.global [$1], [$2], {size}; mov.u32 $0, 0; }}"
        )
        if copied
        else None,
        "ROW_PIECE": size // dtype.itemsize,
        "ROW_BYTES": dtype.itemsize,
    }


def can_copy(block: int, group_channels: int, itemsize: int, bits: int) -> bool:
    """Whether every block of every row starts at a multiple of what is copied at a time.

    bits: `row_bits` of all inputs that are copied.
    """
    return NVIDIA.value and not group_channels % block and not bits % min(16, block * itemsize)


@triton.jit
def load_rows(ptr, first, count, step, stride, d, mask, WIDE: tl.constexpr, STEPS: tl.constexpr):
    """Rows first ... first + STEPS - 1 as a tuple; from step `count` on the last again."""
    rows = ()
    for j in tl.static_range(STEPS):
        rows += (load_row(ptr, tl.minimum(first + j, count - 1) * step, stride, d, mask, WIDE),)
    return rows


@triton.jit
def _copy_rows(
    place,
    ptr,
    first,
    count,
    step,
    stride,
    channel,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_COPY: tl.constexpr,
    ROW_PIECE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Start copying those rows, from `channel` on, to shared memory at `place`."""
    A_ROW: tl.constexpr = BLOCK_D // ROW_PIECE
    PIECES: tl.constexpr = STEPS * A_ROW
    # Of fewer pieces than lanes each is one lane's alone.
    i = tl.arange(0, PIECES if PIECES > 32 else 32)
    j = i // A_ROW
    at = tl.minimum(first + j, count - 1) * step
    source = ptr + row_offset(at, stride, channel + i % A_ROW * ROW_PIECE, WIDE)
    tl.inline_asm_elementwise(
        ROW_COPY,
        "=r,r,l,r",
        [
            place + i * (ROW_PIECE * ROW_BYTES),
            source.to(tl.int64, bitcast=True),
            (i < PIECES).to(tl.int32),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy_block(
    place,
    a_row,
    a_time,
    b_row,
    b_time,
    c_row,
    c_time,
    d_row,
    d_time,
    first,
    count,
    step,
    channel,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_COPY: tl.constexpr,
    ROW_PIECE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Start copying those rows of up to four inputs, one behind the other, as a group; None for no input."""
    SIZE: tl.constexpr = STEPS * BLOCK_D * ROW_BYTES
    _copy_rows(
        place, a_row, first, count, step, a_time, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE,
        ROW_BYTES,
    )  # fmt: skip
    place += SIZE
    _copy_rows(
        place, b_row, first, count, step, b_time, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE,
        ROW_BYTES,
    )  # fmt: skip
    place += SIZE
    if c_row is not None:
        _copy_rows(
            place, c_row, first, count, step, c_time, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE,
            ROW_BYTES,
        )  # fmt: skip
    place += SIZE
    if d_row is not None:
        _copy_rows(
            place, d_row, first, count, step, d_time, channel, WIDE, STEPS, BLOCK_D, ROW_COPY, ROW_PIECE,
            ROW_BYTES,
        )  # fmt: skip
    copies_made()


@triton.jit
def copied_row(place, j, lane, BLOCK_D: tl.constexpr, ROW_READ: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Row j of those at `place`, [BLOCK_D] fp32."""
    return tl.inline_asm_elementwise(
        ROW_READ,
        "=f,r",
        [place + (j * BLOCK_D + lane) * ROW_BYTES],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copies_made():
    """What was started since the last such call belongs together."""
    tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def copies_wait(WAIT: tl.constexpr):
    """All copies but those of the last WAIT groups have arrived, and all lanes see them."""
    if WAIT == 0:
        tl.inline_asm_elementwise(
            "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.inline_asm_elementwise(
            "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

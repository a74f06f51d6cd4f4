"""Tiles of states that a program of one warp puts aside: in shared memory, or in device memory to be fetched.

Each lane reads back the share of a tile that it stored itself, so nobody waits for anybody, and pieces of 16
bytes of all lanes stand side by side. With the tiles stand step sizes, which lanes compute for each other.
Triton has no word for shared memory, so this is PTX; without it (KEPT is False) a kernel keeps its tiles in a
scratch in device memory.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors
from __future__ import annotations

import functools

import triton
import triton.language as tl

from ssm_modal.kernels.scan.launch import padded_state
from ssm_modal.kernels.scan.prefetch import copied_row
from ssm_modal.kernels.scan.staging import WARP, operands, pieces, stage_wait
from ssm_modal.kernels.scan.triton_common import load_row, time_step
from ssm_modal.kernels.triton_math import NVIDIA


@functools.cache
def kept_states(d_state: int, block: int) -> dict[str, object]:
    """Constants of a kernel that puts tiles of states aside; KEPT is False where there is no assembly."""
    names = (
        "KEEP", "KEEP_CONSTRAINTS", "TAKE", "TAKE_CONSTRAINTS", "LEAVE", "LEAVE_CONSTRAINTS", "FETCH",
        "FETCH_CONSTRAINTS",
    )  # fmt: skip
    kept = bool(NVIDIA.value)
    code = keep_assembly(max(1, padded_state(d_state) * block // WARP)) if kept else (None,) * 8
    return {"KEPT": kept, **dict(zip(names, code))}


@functools.cache
def keep_assembly(registers: int) -> tuple[str, ...]:
    """PTX and constraints that keep a tile of a warp in shared memory and take it back, and that leave it in
    device memory and fetch it from there into shared memory, asynchronously.

    Inputs: (the registers,) and the addresses of the lane's first pieces; pieces of all lanes stand side by
    side.
    """
    wide, vector = pieces(registers)
    places = [(i, WARP * 4 * i) for i in range(0, registers, wide)]
    nothing = [f"mov.u32 ${i}, 0;" for i in range(registers)]
    cache = "cg" if wide == 4 else "ca"
    keep = [
        f"st.shared{vector}.f32 [${2 * registers} + {at}], {operands(registers + i, wide)};"
        for i, at in places
    ]
    take = [f"ld.shared{vector}.f32 {operands(i, wide)}, [${registers} + {at}];" for i, at in places]
    leave = [
        f"st.global{vector}.f32 [${2 * registers} + {at}], {operands(registers + i, wide)};"
        for i, at in places
    ]
    fetch = [
        f"cp.async.{cache}.shared.global [${registers} + {at}], [${2 * registers} + {at}], {4 * wide};"
        for _, at in places
    ]
    out, given, address, pointer = (",".join([kind] * registers) for kind in ("=r", "f", "r", "l"))
    return (
        " ".join(keep + nothing),
        f"{out},{given},{address}",
        " ".join(take),
        f"{out.replace('r', 'f')},{address}",
        " ".join(leave + nothing),
        f"{out},{given},{pointer}",
        " ".join(fetch + nothing),
        f"{out},{address},{pointer}",
    )


@triton.jit
def keep_place(base, n, lane, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where each lane keeps its share of a tile at `base`, in its first register."""
    Q: tl.constexpr = 32 // BLOCK_D
    R: tl.constexpr = BLOCK_N // Q
    PIECE: tl.constexpr = 4 if R % 4 == 0 else R
    return base + ((n[:, None] % Q) * BLOCK_D + lane[None, :]) * (PIECE * 4)


@triton.jit
def keep_tile(place, tile, KEEP: tl.constexpr, KEEP_CONSTRAINTS: tl.constexpr):
    """Store a tile [BLOCK_N, BLOCK_D]; each lane reads back what it stored itself, so nobody waits."""
    tl.inline_asm_elementwise(
        KEEP,
        KEEP_CONSTRAINTS,
        [tile, place],
        dtype=tl.int32,
        is_pure=False,
        pack=tile.shape[0] * tile.shape[1] // 32,
    )


@triton.jit
def _keep_numbers(place, numbers, own):
    """Store one number a lane, fp32, where `own` (int32) is not 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,f,r",
        [place, numbers, own],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def take_row(place):
    """One number a channel, of those that `keep_times` stored."""
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def keep_times(
    base,
    x_ptr,
    x_rows,
    first,
    count,
    step,
    stride,
    d,
    mask_d,
    lane,
    bias,
    SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_READ: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Store the step sizes of steps first ... first + STEPS - 1 at `base`, for `take_row`.

    All at once, so that they are under way together: one by one, each would be waited for. Lanes that share a
    channel take a step each. x_ptr: the row of delta of step 0; x_rows: these steps' rows in shared memory,
    read where ROW_READ is not None.
    """
    Q: tl.constexpr = 32 // BLOCK_D
    q = tl.arange(0, Q)[:, None]
    if Q > 1:
        # Other lanes may still be reading the step sizes before these.
        stage_wait()
    xs = ()
    for j in tl.static_range(0, STEPS, Q):
        mine = j + q
        if STEPS < Q:
            mine = tl.minimum(mine, STEPS - 1)
        if ROW_READ is not None:
            xs += (copied_row(x_rows, mine, lane[None, :], BLOCK_D, ROW_READ, ROW_BYTES),)
        else:
            at = tl.minimum(first + mine, count - 1) * step
            xs += (load_row(x_ptr, at, stride, d[None, :], mask_d[None, :], WIDE).to(tl.float32),)
    times = ()
    for k in tl.static_range(len(xs)):
        times += (time_step(xs[k], bias[None, :], True, SOFTPLUS),)
    for k in tl.static_range(len(xs)):
        place = base + ((k * Q + q) * BLOCK_D + lane[None, :]) * 4
        _keep_numbers(place, times[k], (k * Q + q < STEPS).to(tl.int32) + lane[None, :] * 0)
    if Q > 1:
        stage_wait()


@triton.jit
def leave_tile(pointer, tile, LEAVE: tl.constexpr, LEAVE_CONSTRAINTS: tl.constexpr):
    """`keep_tile` in device memory, at int64 addresses."""
    tl.inline_asm_elementwise(
        LEAVE,
        LEAVE_CONSTRAINTS,
        [tile, pointer],
        dtype=tl.int32,
        is_pure=False,
        pack=tile.shape[0] * tile.shape[1] // 32,
    )


@triton.jit
def fetch_tile(place, pointer, FETCH: tl.constexpr, FETCH_CONSTRAINTS: tl.constexpr):
    """Start copying the tile left at `pointer` to `place`; see `prefetch.py` for its arrival."""
    tl.inline_asm_elementwise(
        FETCH,
        FETCH_CONSTRAINTS,
        [place, pointer],
        dtype=tl.int32,
        is_pure=False,
        pack=place.shape[0] * place.shape[1] // 32,
    )


@triton.jit
def tiles_left():
    """What this lane left in device memory comes before what it fetches."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.cta; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def take_tile(place, TAKE: tl.constexpr, TAKE_CONSTRAINTS: tl.constexpr):
    """The tile that `keep_tile` stored at `place`."""
    return tl.inline_asm_elementwise(
        TAKE,
        TAKE_CONSTRAINTS,
        [place],
        dtype=tl.float32,
        is_pure=False,
        pack=place.shape[0] * place.shape[1] // 32,
    )

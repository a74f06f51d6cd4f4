"""Sums over the channels of a tile of states, without an add for every state and lane.

A warp holds a tile [N, D] with the channels d across lanes and R = N * D / 32 states in each lane. A plain
reduction exchanges every state with every distance: R * log2(D) shuffles. Here lanes halve what they are
responsible for as they go: over distance D / 2 each gives away one half of its states and takes in the
partner's share of the other half, over D / 4 a quarter, and so on: R shuffles at most. In the end each lane
holds the sums of few states, or of one.

Triton has no word for that, so it is PTX on the registers of the tile; under the interpreter, and on other
makes of GPU, the plain reduction stands in for it. What the assembly takes for granted of the tile's layout
(`state_tile` in `triton_common.py` brings it about) is checked at compile time by tests/kernels/test_aot.py.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ssm_modal.kernels.dispatch import interpreting
from ssm_modal.kernels.scan.triton_common import row_offset

WARP = 32


def channel_sum_assembly(block_n: int, block_d: int) -> tuple[str | None, str | None]:
    """`assembly` for a tile [block_n, block_d] of one warp; (None, None) for the plain reduction."""
    if interpreting() or torch.version.hip is not None:
        return None, None
    return assembly(block_n, block_d)


@functools.cache
def assembly(block_n: int, block_d: int) -> tuple[str, str]:
    """PTX and constraints for a tile [block_n, block_d] with at least a state a lane.

    Outputs and first inputs are the R states of a lane in the order of n, further inputs R copies of its
    channel's number in the tile. The first R / D outputs, or the first, hold sums; `add_row` knows whose.
    """
    states = block_n * block_d // WARP
    if states < 1 or block_d > WARP:
        raise ValueError(f"a tile [{block_n}, {block_d}] is not one of a warp")
    lines = [
        ".reg .f32 s, r;",
        ".reg .pred p;",
        ".reg .b32 bit;",
        f".reg .f32 v<{states}>;",
        *(f"mov.f32 v{i}, ${states + i};" for i in range(states)),
    ]
    held, distance = states, block_d // 2
    while distance:
        if held > 1:
            held //= 2
            lines += [f"and.b32 bit, ${2 * states}, {distance};", "setp.ne.u32 p, bit, 0;"]
            for i in range(held):
                lines += [
                    f"selp.f32 s, v{i}, v{i + held}, p;",
                    f"selp.f32 v{i}, v{i + held}, v{i}, p;",
                    f"shfl.sync.bfly.b32 r, s, {distance}, 0x1f, 0xffffffff;",
                    f"add.f32 v{i}, v{i}, r;",
                ]
        else:
            lines += [f"shfl.sync.bfly.b32 r, v0, {distance}, 0x1f, 0xffffffff;", "add.f32 v0, v0, r;"]
        distance //= 2
    lines += [f"mov.f32 ${i}, {f'v{i}' if i < held else '0f00000000'};" for i in range(states)]
    constraints = ",".join(["=f"] * states + ["f"] * states + ["r"] * states)
    return "{ " + " ".join(lines) + " }", constraints


@triton.jit
def over_channels(x, lane, SUM: tl.constexpr, CONSTRAINTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """x [BLOCK_N, D] summed over d: [BLOCK_N], or, with assembly, a tile of which `add_row` knows the
    places."""
    if SUM is None:
        return tl.sum(x, axis=1)
    else:
        sums = tl.inline_asm_elementwise(
            SUM,
            CONSTRAINTS,
            [x, tl.broadcast_to(lane[None, :], x.shape)],
            dtype=tl.float32,
            is_pure=True,
            pack=BLOCK_N * lane.shape[0] // 32,
        )
        if lane.shape[0] == 32:
            # All states of a channel are in one lane: its first register, and no exchange.
            return tl.reduce(sums, 0, _first)
        else:
            return sums


@triton.jit
def _first(a, b):
    return a


@triton.jit
def add_row(
    row,
    at,
    stride,
    sums,
    n,
    lane,
    d_state,
    accumulate,
    valid,
    SUM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store what `over_channels` gave in row `at` of states; where `accumulate`, add it to what is there."""
    if SUM is None:
        place = row + row_offset(at, stride, n, WIDE)
        mask = (n < d_state) & valid
    else:
        HELD: tl.constexpr = BLOCK_N * BLOCK_D // 32
        # Lanes that share a sum, where there are more channels than states; sums of a lane where fewer.
        ALIKE: tl.constexpr = BLOCK_D // HELD if BLOCK_D > HELD else 1
        LAST: tl.constexpr = HELD // BLOCK_D if HELD > BLOCK_D else 1
        if BLOCK_D == 32:
            state = lane // ALIKE
            mask = (lane % ALIKE == 0) & (state < d_state) & valid
        else:
            FIRST: tl.constexpr = LAST * (32 // BLOCK_D)
            state = (lane * FIRST)[None, :] + n[:, None]
            mask = (n[:, None] < FIRST) & (state < d_state) & valid
            # Channels stay across lanes.
            state = tl.max_contiguous(tl.multiple_of(state, [1, 1]), [1, 2])
        place = row + row_offset(at, stride, state, WIDE)
    sums += tl.load(place, mask=mask & accumulate, other=0.0)
    tl.store(place, sums, mask=mask)

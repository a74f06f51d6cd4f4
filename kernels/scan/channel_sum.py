"""Sums over the channels of two tiles of states, on tensor cores, added to rows in memory.

A warp holds tiles [N, D] with the channels d across lanes and R = N * D / 32 states in each lane; the
backward of the scan wants sum over d of two of them (the shares of dB and dC of one step). A plain reduction
exchanges every state over every distance. Here

1. a matrix product with a matrix of zeros and ones (`mma` m16n8k8, tf32) sums every state over groups of four
   lanes: register 4 q + j of all lanes comes out in the four registers of the lanes with lane % 4 = q, so
   that eight registers remain of the two tiles;
2. where all lanes are channels, each puts its registers into shared memory, and after a block of steps every
   lane adds up the eight groups for four of the sums of one step (`flush_channels`). Where lanes share
   channels, lanes halve what they are responsible for over the remaining distances: each gives away one half
   of its registers and takes in the partner's share of the other half;
3. each lane adds the sums it is left with to their places, without waiting for the result. In memory the
   states of a lane stand together (`triton_totals.py` puts them back), so that it adds four at a time.

Tensor cores cut their operands to 11 significant bits; SPLIT feeds what was cut off as well. Triton has no
word for any of this, so it is PTX on the registers of the tile; under the interpreter, and on other makes of
GPU, plain reductions stand in for it. What the assembly takes for granted of the tile's layout (`state_tile`
in `triton_common.py` brings it about) is checked at compile time by tests/kernels/test_channel_sum.py.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ssm_modal.kernels.dispatch import interpreting
from ssm_modal.kernels.scan.launch import padded_state

WARP = 32
# Registers of a lane after the matrix products: four of each tile.
PRODUCTS = 8
# Bytes between groups of four lanes in shared memory, and between the tiles: eight groups, and as much again
# as lets lanes that read two tiles take different banks.
GROUP, APART = 64, 9 * 64
SHARED_APART = tl.constexpr(APART)


@dataclass(frozen=True)
class ChannelSum:
    """PTX, and its constraints, for two tiles of one warp: the sums, and their addition to memory.

    held: registers of each lane that hold sums in the end; 0 where they are in shared memory and `add` is the
    flush of a block of steps.
    """

    sums: str
    sums_constraints: str
    add: str
    add_constraints: str
    held: int


def sums_in_shared(d_state: int, block: int, steps: int) -> bool:
    """Whether the sums of a block of steps meet in shared memory: a lane for every four of them."""
    return block == WARP and 2 * steps * max(1, padded_state(d_state) // 4) <= WARP


def sums_bytes(d_state: int, block: int, steps: int) -> int:
    """Bytes of shared memory in which they meet."""
    return 2 * steps * APART if sums_in_shared(d_state, block, steps) else 0


def channel_sum(d_state: int, block: int, steps: int, dtype: torch.dtype, vectors: bool) -> dict[str, object]:
    """Constants of the gradient kernel: SUMS, ADD, their constraints, HELD; None for plain reductions.

    steps: those between two flushes. dtype: that of the inputs; fp32 is summed to its full precision.
    vectors: the GPU adds four numbers to memory at a time, as those of compute capability 9.0 and newer do.
    """
    if interpreting() or torch.version.hip is not None:
        return dict.fromkeys(("SUMS", "SUMS_CONSTRAINTS", "ADD", "ADD_CONSTRAINTS", "HELD"))
    shared = sums_in_shared(d_state, block, steps)
    code = assembly(padded_state(d_state), block, dtype == torch.float32, shared, vectors)
    return {
        "SUMS": code.sums,
        "SUMS_CONSTRAINTS": code.sums_constraints,
        "ADD": code.add,
        "ADD_CONSTRAINTS": code.add_constraints,
        "HELD": code.held,
    }


@functools.cache
def assembly(block_n: int, block_d: int, split: bool, shared: bool, vectors: bool) -> ChannelSum:
    """PTX for tiles [block_n, block_d].

    `sums` takes the R registers of a lane of either tile in the order of n, then R copies of the lane's
    number in the warp; its first `held` outputs are sums. `add` takes R sums and R copies of an address,
    that of the lane's first sum (`sum_place`), and adds the first `held` sums there and behind it. The sums
    of the second tile stand behind those of the first in memory.

    shared: `sums` takes R copies of an address in shared memory besides and puts the sums of the first tile
    there, those of the second APART bytes further; `add` takes an address there, one in device memory,
    16-byte aligned, and a flag, and adds four sums where the flag is not 0.
    """
    states = block_n * block_d // WARP
    if states < 1 or block_d > WARP:
        raise ValueError(f"tiles [{block_n}, {block_d}] are not those of a warp")
    if states < 16 and block_d >= 4 and not shared:
        # Some of four lanes would be left without a state.
        raise ValueError(f"the sums of tiles [{block_n}, {block_d}] meet in shared memory: take fewer steps")
    first, lane = states, 3 * states
    lines = [".reg .f32 s, r;", ".reg .pred p;", ".reg .b32 bit;"]
    if block_d >= 4:
        held, distance = PRODUCTS, block_d // 2
        lines += _products(states, first, lane, split)
    else:
        held, distance = 2 * states, block_d // 2
        lines += [f".reg .f32 v<{held}>;"]
        lines += [f"mov.f32 v{i}, ${first + i};" for i in range(held)]
    if shared:
        group = 4 * states
        lines += [
            "shr.u32 g, $LANE, 2;".replace("$LANE", f"${lane}"),
            "and.b32 w, $LANE, 3;".replace("$LANE", f"${lane}"),
        ]
        lines += [f"mad.lo.u32 g, g, {GROUP}, ${group};", "mad.lo.u32 g, w, 16, g;"]
        lines += [
            "st.shared.v4.f32 [g], {v0, v1, v2, v3};",
            f"st.shared.v4.f32 [g + {APART}], {{v4, v5, v6, v7}};",
        ]
        lines += [f"mov.u32 ${i}, 0;" for i in range(states)]
        return ChannelSum(
            sums=_block(lines),
            sums_constraints=",".join(["=r"] * states + ["f"] * (2 * states) + ["r"] * (2 * states)),
            add=_flush(vectors),
            add_constraints="=r,r,l,r",
            held=0,
        )
    while distance >= (4 if block_d >= 4 else 1):
        held //= 2
        lines += [f"and.b32 bit, ${lane}, {distance};", "setp.ne.u32 p, bit, 0;"]
        for i in range(held):
            lines += [
                f"selp.f32 s, v{i}, v{i + held}, p;",
                f"selp.f32 v{i}, v{i + held}, v{i}, p;",
                f"shfl.sync.bfly.b32 r, s, {distance}, 0x1f, 0xffffffff;",
                f"add.f32 v{i}, v{i}, r;",
            ]
        distance //= 2
    lines += [f"mov.f32 ${i}, {f'v{i}' if i < held else '0f00000000'};" for i in range(states)]
    return ChannelSum(
        sums=_block(lines),
        sums_constraints=",".join(["=f"] * states + ["f"] * (2 * states) + ["r"] * states),
        add=" ".join(
            _added(
                states,
                2 * states,
                held,
                min(held, 4 if block_d >= 4 else states),
                vectors,
                4 * memory_states(block_n),
            )
            + [f"mov.u32 ${i}, 0;" for i in range(states)]
        ),
        add_constraints=",".join(["=r"] * states + ["f"] * states + ["l"] * states),
        held=held,
    )


def memory_states(block_n: int) -> int:
    """Numbers of a row of sums in memory: four at least."""
    return max(4, block_n)


def _added(first: int, address: int, held: int, together: int, vectors: bool, plane: int) -> list[str]:
    """PTX that adds `held` registers from $first on to memory at $address.

    together: registers whose places follow each other; the next ones are `plane` bytes further.
    """
    wide = next(w for w in (4, 2, 1) if together % w == 0) if vectors else 1
    lines = []
    for i in range(0, held, wide):
        at = i // together * plane + i % together * 4
        names = ", ".join(f"${first + i + j}" for j in range(wide))
        given, vector = (names, "") if wide == 1 else (f"{{{names}}}", f".v{wide}")
        lines += [f"red.global.add{vector}.f32 [${address} + {at}], {given};"]
    return lines


def _flush(vectors: bool) -> str:
    """PTX that adds the eight groups of four sums at an address in shared memory to memory."""
    lines = [".reg .f32 a<4>, b<4>;", ".reg .pred p;", "ld.shared.v4.f32 {a0, a1, a2, a3}, [$1];"]
    for group in range(1, 8):
        lines += [f"ld.shared.v4.f32 {{b0, b1, b2, b3}}, [$1 + {GROUP * group}];"]
        lines += [f"add.f32 a{i}, a{i}, b{i};" for i in range(4)]
    lines += ["setp.ne.u32 p, $3, 0;"]
    if vectors:
        lines += ["@p red.global.add.v4.f32 [$2], {a0, a1, a2, a3};"]
    else:
        lines += [f"@p red.global.add.f32 [$2 + {4 * i}], a{i};" for i in range(4)]
    return _block([*lines, "mov.u32 $0, 0;"])


def _block(lines: list[str]) -> str:
    return "{ " + " ".join(lines) + " }"


def _products(states: int, first: int, lane: int, split: bool) -> list[str]:
    """Registers v0 ... v3 of the first tile and v4 ... v7 of the second: sums over groups of four lanes.

    In an m16n8k8 product operand A of a lane is (row lane / 4, column lane % 4) and 8 rows or 4 columns
    further; B is (row lane % 4 or 4 further, column lane / 4); the result is (row lane / 4 or 8 further,
    columns 2 (lane % 4) and one further). Ones in column 2 q of the upper half of B and in column 2 q + 1 of
    the lower half bring registers 4 q + 0, 2 and 4 q + 1, 3 of A into the lanes with lane % 4 = q.
    """
    lines = [
        f".reg .f32 v<{PRODUCTS}>;",
        ".reg .f32 h, l;",
        ".reg .b32 a<4>, c<4>, upper, lower, g, w;",
        f"shr.u32 g, ${lane}, 2;",
        "and.b32 g, g, 7;",
        *(f"mov.f32 v{i}, 0f00000000;" for i in range(PRODUCTS)),
    ]
    for q in range(max(1, states // 4)):
        for half, name in ((0, "upper"), (1, "lower")):
            lines += [
                f"setp.eq.u32 p, g, {2 * q + half};",
                f"selp.b32 {name}, 0x3f800000, 0, p;",
            ]
        for tile in range(2):
            for place, register in enumerate((0, 2, 1, 3)):
                i = 4 * q + register
                if i >= states:
                    lines += [f"mov.b32 a{place}, 0;", f"mov.b32 c{place}, 0;"]
                    continue
                value = f"${first + tile * states + i}"
                if split:
                    lines += [
                        f"mov.b32 w, {value};",
                        f"and.b32 a{place}, w, 0xffffe000;",
                        f"mov.b32 h, a{place};",
                        f"sub.f32 l, {value}, h;",
                        f"mov.b32 c{place}, l;",
                    ]
                else:
                    lines += [f"mov.b32 a{place}, {value};"]
            to = ", ".join(f"v{4 * tile + i}" for i in range(4))
            for operand in ("a", "c") if split else ("a",):
                given = ", ".join(f"{operand}{i}" for i in range(4))
                lines += [
                    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                    f"{{{to}}}, {{{given}}}, {{upper, lower}}, {{{to}}};"
                ]
    return lines


@triton.jit
def sum_place(HELD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the first sum that a lane holds belongs in a row of sums in memory, counted in numbers."""
    if HELD is None or HELD == 0:
        return 0
    else:
        R: tl.constexpr = BLOCK_N * BLOCK_D // 32
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
        )
        channel = lane % BLOCK_D
        if BLOCK_D >= 4:
            # Of four lanes each holds four states of both tiles; so many of them as are left after halving.
            v = channel // 4 * HELD
            tile = v // 4
            i = 4 * (channel % 4) + v % 4
        else:
            v = channel * HELD
            tile = v // R
            i = v % R
        return tile * BLOCK_N + lane // BLOCK_D * R + i


@triton.jit
def add_channels(
    row,
    plane,
    x,
    y,
    n,
    lane,
    mask_n,
    place,
    shared,
    SUMS: tl.constexpr,
    SUMS_CONSTRAINTS: tl.constexpr,
    ADD: tl.constexpr,
    ADD_CONSTRAINTS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add x and y [BLOCK_N, BLOCK_D], summed over d, to the numbers at `row` and at `row` + `plane`.

    They stand there with the states of a lane together. place: that of `sum_place`. Where HELD is 0 the sums
    are put into shared memory at `shared`, for `flush_channels`.
    """
    if SUMS is None:
        Q: tl.constexpr = 32 // BLOCK_D
        to = n
        if BLOCK_N > Q:
            to = n % Q * (BLOCK_N // Q) + n // Q
        tl.atomic_add(row + to, tl.sum(x, axis=1), mask=mask_n, sem="relaxed")
        tl.atomic_add(row + plane + to, tl.sum(y, axis=1), mask=mask_n, sem="relaxed")
    elif HELD == 0:
        tl.inline_asm_elementwise(
            SUMS,
            SUMS_CONSTRAINTS,
            [x, y, n[:, None] * 0 + lane[None, :], (n[:, None] + lane[None, :]) * 0 + shared],
            dtype=tl.int32,
            is_pure=False,
            pack=BLOCK_N,
        )
    else:
        Q: tl.constexpr = 32 // BLOCK_D
        R: tl.constexpr = BLOCK_N // Q
        lanes = (n[:, None] % Q) * BLOCK_D + lane[None, :]
        sums = tl.inline_asm_elementwise(
            SUMS, SUMS_CONSTRAINTS, [x, y, lanes], dtype=tl.float32, is_pure=True, pack=R
        )
        tl.inline_asm_elementwise(
            ADD,
            ADD_CONSTRAINTS,
            [sums, lanes * 0 + (row + place).to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=R,
        )


@triton.jit
def flush_channels(
    rows,
    plane,
    shared,
    first,
    steps,
    step,
    stride,
    ADD: tl.constexpr,
    ADD_CONSTRAINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add what `add_channels` put into shared memory for steps first ... first + steps - 1 to their rows.

    A lane takes four states of one tile of one step.
    """
    PARTS: tl.constexpr = BLOCK_N // 4 if BLOCK_N >= 4 else 1
    i = tl.arange(0, 32)
    part = i % PARTS
    tile = i // PARTS % 2
    j = tl.minimum(i // (2 * PARTS), steps - 1)
    to = rows + ((first + j) * step).to(tl.int64) * stride + tile * plane + part * 4
    tl.inline_asm_elementwise(
        ADD,
        ADD_CONSTRAINTS,
        [
            shared + (j * 2 + tile) * SHARED_APART + part * 16,
            to.to(tl.int64, bitcast=True),
            (i // (2 * PARTS) < steps).to(tl.int32),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )

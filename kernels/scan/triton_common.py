"""What the forward and the backward Triton kernels of the selective scan share.

Time is cut in chunks. A chunk maps the state that enters it to the one that leaves it, elementwise,
h_out = exp(A * sum of dt) * h_in + e, where e is the state it ends with when entered with zero; the gradient
of the states obeys the same law in the other direction. Both directions therefore run three passes: every
chunk alone (`e` and the sum of dt), the carry over chunks (`carry` below), every chunk again with its true
entering state.

Chunks are numbered sequence by sequence, in time order: chunk i of row b of a dense batch is `b * n_chunks +
i`; packed sequences bring a table. Tables of states are (chunks, d_state, d_inner) fp32, contiguous.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.dispatch import interpreting
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.kernels.triton_math import NVIDIA, softplus

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Channels of one program of the carry, a warp, and chunks whose loads are under way at a time: the programs
# of a multiprocessor together keep some 30 KiB under way.
CARRY_BLOCK, CARRY_DEPTH = 128, 4


# Triton's interpreter cannot turn a tensor into a loop bound under numpy 2.4 and later.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def trips(n):
    """The runtime scalar `n` as the bound of a `range`."""
    if INTERPRETED:
        return n.handle.data.item()
    else:
        return n


@triton.jit
def again(x):
    """x (int32), of which the compiler does not know that it has seen it before: each lane asks itself.

    What is computed from it is computed again; kept from the first time it would take registers.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 0, 0x1f, 0xffffffff;",
            "=r,r",
            [x],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return x


@triton.jit
def load_row(ptr, i, stride, lanes, mask, WIDE: tl.constexpr):
    """Row i, counted from the row at `ptr`, of an array with a contiguous last axis; 0 where masked.

    The offset from `ptr` is 32 bits unless WIDE: 64-bit addresses for every lane and array cost registers.
    """
    return tl.load(ptr + row_offset(i, stride, lanes, WIDE), mask=mask, other=0.0)


@triton.jit
def row_offset(i, stride, lanes, WIDE: tl.constexpr):
    if WIDE:
        return i.to(tl.int64) * stride + lanes
    else:
        return i * stride + lanes


@triton.jit
def time_step(raw, bias, valid, SOFTPLUS: tl.constexpr):
    """dt of one step from the row of delta in fp32; 0 where not valid, so that the step is the identity."""
    x = raw + bias
    if SOFTPLUS:
        x = softplus(x)
    return tl.where(valid, x, 0.0)


@triton.jit
def state_tile(n, d, d_inner):
    """Offsets [N, D] of states n and channels d in a (d_state, d_inner) table.

    Channels are contiguous in memory, so they lie across lanes, and each thread holds all states of its
    channel (of every q-th state, where the tile has 32 / q channels).
    """
    return n[:, None].to(tl.int64) * d_inner + d[None, :]


@triton.jit
def channel_block(block, group_channels, blocks_per_group, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr):
    """Group, channels [BLOCK_D] int32 and their mask of a channel block; none spans two groups.

    FULL_D: all blocks are full, so that masks cost nothing.
    """
    group = block // blocks_per_group
    inside = (block % blocks_per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside < group_channels
    if FULL_D:
        mask = tl.full([BLOCK_D], 1, tl.int1)
    return group, group * group_channels + inside, mask


@triton.jit
def first_channel(block, group_channels, blocks_per_group, BLOCK_D: tl.constexpr):
    """The first channel of a channel block."""
    return (block // blocks_per_group) * group_channels + (block % blocks_per_group) * BLOCK_D


@triton.jit
def state_block(d_state, BLOCK_N: tl.constexpr, FULL_N: tl.constexpr):
    """States [BLOCK_N] int32 and their mask; FULL_N: d_state is BLOCK_N."""
    n = tl.arange(0, BLOCK_N)
    mask = n < d_state
    if FULL_N:
        mask = tl.full([BLOCK_N], 1, tl.int1)
    return n, mask


@triton.jit
def chunk_range(chunk, start_ptr, end_ptr, length, n_chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Row of the batch and steps [start, end), all int64, of a chunk (int32)."""
    if PACKED:
        row = (chunk * 0).to(tl.int64)
        start = tl.load(start_ptr + chunk)
        end = tl.load(end_ptr + chunk)
    else:
        # Divisions stay in 32 bits: in 64 they are calls.
        row = (chunk // n_chunks).to(tl.int64)
        start = (chunk % n_chunks).to(tl.int64) * CHUNK
        end = tl.minimum(start + CHUNK, length)
    return row, start, end


# Extents that change from call to call: no kernel is compiled anew for a value of 1 or a multiple of 16.
EXTENTS = [
    "batch",
    "length",
    "n_chunks",
    "d_inner",
    "groups",
    "group_channels",
    "blocks_per_group",
    "blocks_per_split",
    "blocks",
    "splits",
    "partials",
    "subs",
    "items",
    "programs",
    "runs_per_row",
    "run_length",
    "tiles",
]


@triton.jit(do_not_specialize=EXTENTS)
def carry_kernel(
    states_ptr,  # (chunks, d_state, d_inner): contribution of each chunk; becomes the state entering it
    sums_ptr,  # (chunks, d_inner): sum of dt of each chunk
    a_ptr,  # (d_state, d_inner)
    entry_ptr,  # (runs, d_state, d_inner) or None for zeros
    exit_ptr,  # (runs, d_state, d_inner) or None: the state after each run
    run_sums_ptr,  # (runs, d_inner) or None: sum of dt over each run
    lo_ptr,  # packed: (runs,) int64, the chunks of a run are [lo, hi)
    hi_ptr,
    n_chunks,
    runs_per_row,
    run_length,
    d_inner,
    d_state,
    tiles,
    PACKED: tl.constexpr,
    DESCENDING: tl.constexpr,
    WRITE: tl.constexpr,
    FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program a run of chunks and BLOCK channels of one state. FOURS: d_inner is a multiple of 4."""
    pid = tl.program_id(0)
    run = (pid // tiles).to(tl.int64)
    if FOURS:
        # The compiler sees it, and loads and stores 16 bytes a lane.
        d_inner = d_inner // 4 * 4
    size = d_inner.to(tl.int64) * d_state
    blocks = (d_inner + BLOCK - 1) // BLOCK
    n = (pid % tiles // blocks).to(tl.int64)
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = d < d_inner
    tile = n * d_inner
    if PACKED:
        lo = tl.load(lo_ptr + run)
        hi = tl.load(hi_ptr + run)
    else:
        row = (pid // tiles // runs_per_row).to(tl.int64)
        lo = row * n_chunks + (pid // tiles % runs_per_row).to(tl.int64) * run_length
        hi = tl.minimum(lo + run_length, (row + 1) * n_chunks)
    rate = tl.load(a_ptr + tile + d, mask=mask, other=0.0) * LOG2E
    h = tl.zeros([BLOCK], tl.float32)
    if entry_ptr is not None:
        h = tl.load(entry_ptr + run * size + tile + d, mask=mask, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    count = (hi - lo).to(tl.int32)
    first = lo
    step = 1
    if DESCENDING:
        first = hi - 1
        step = -1
    states_ptr += first * size + tile
    sums_ptr += first * d_inner
    states_step = step * size
    sums_step = step * d_inner.to(tl.int64)
    # The next DEPTH chunks are loaded before these are used: no load waits for the recurrence or may pass a
    # store. Beyond the last chunk own and dt are 0, which leaves h as it is.
    own = ()
    dt = ()
    for j in tl.static_range(DEPTH):
        own += (tl.load(states_ptr + j * states_step + d, mask=mask & (j < count), other=0.0),)
        dt += (tl.load(sums_ptr + j * sums_step + d, mask=mask & (j < count), other=0.0),)
    for i in range(0, trips(count), DEPTH):
        states_next = states_ptr + DEPTH * states_step
        sums_next = sums_ptr + DEPTH * sums_step
        next_own = ()
        next_dt = ()
        for j in tl.static_range(DEPTH):
            ahead = i + DEPTH + j < count
            next_own += (tl.load(states_next + j * states_step + d, mask=mask & ahead, other=0.0),)
            next_dt += (tl.load(sums_next + j * sums_step + d, mask=mask & ahead, other=0.0),)
        for j in tl.static_range(DEPTH):
            if WRITE:
                tl.store(states_ptr + j * states_step + d, h, mask=mask & (i + j < count))
            h = tl.exp2(rate * dt[j]) * h + own[j]
            total += dt[j]
        own = next_own
        dt = next_dt
        states_ptr = states_next
        sums_ptr = sums_next
    if exit_ptr is not None:
        tl.store(exit_ptr + run * size + tile + d, h, mask=mask)
    if run_sums_ptr is not None:
        # Programs of the same channels find the same sum; the one of state 0 writes it.
        tl.store(run_sums_ptr + run * d_inner + d, total, mask=mask & (n == 0))


@functools.cache
def _carry_launcher(packed: bool, descending: bool, write: bool, fours: bool) -> Launcher:
    constants = {"PACKED": packed, "DESCENDING": descending, "WRITE": write, "FOURS": fours}
    return Launcher(carry_kernel, constants | {"BLOCK": CARRY_BLOCK, "DEPTH": CARRY_DEPTH, "num_warps": 1})


def carry(
    states: Tensor,
    sums: Tensor,
    A: Tensor,
    entry: Tensor | None,
    *,
    batch: int,
    seqs: Sequences | None,
    chunk_size: int,
    run_length: int,
    descending: bool,
) -> Tensor:
    """Replace each chunk's contribution in `states` by the state entering it; return the last state.

    states: (chunks, d_state, d_inner), sums: (chunks, d_inner), A: (d_state, d_inner), all fp32 contiguous.
    entry: (batch or sequences, d_state, d_inner) fp32 contiguous, the state entering each sequence, or None
    for zeros. Returned: the same shape, the state each sequence ends with; an empty one hands `entry`
    through. `descending` walks the chunks from the last to the first. Sequences of more than 2 * run_length
    chunks are carried in runs, in parallel: over each run alone, over the runs, over each run again.
    """
    n_chunks_all, d_state, d_inner = states.shape
    if seqs is None:
        rows, n_chunks = batch, n_chunks_all // batch
        most = n_chunks
        table = None
    else:
        table = seqs.chunks(chunk_size)
        rows, n_chunks = seqs.n, 0
        most = max(-(-n // chunk_size) for n in seqs.lengths)
    last = states.new_empty(rows, d_state, d_inner)

    def launch(states, sums, entry, last, run_sums, runs, lo, hi, n_chunks, runs_per_row, run_length, write):
        if runs == 0 or d_inner == 0:
            return
        tiles = d_state * -(-d_inner // CARRY_BLOCK)
        _carry_launcher(seqs is not None, descending, write, d_inner % 4 == 0)(
            (runs * tiles,),
            (states, sums, A, entry, last, run_sums, lo, hi),
            (n_chunks, runs_per_row, run_length, d_inner, d_state, tiles),
        )

    first = (None, None) if table is None else (table.first[:-1], table.first[1:])
    if most <= 2 * run_length:
        launch(states, sums, entry, last, None, rows, *first, n_chunks, 1, n_chunks, True)
        return last
    if table is None:
        runs_per_row = triton.cdiv(n_chunks, run_length)
        runs = rows * runs_per_row
        bounds = over = (None, None)
    else:
        groups = seqs.chunks(chunk_size * run_length)
        runs_per_row, runs = 0, groups.n_chunks
        inside = torch.arange(runs, device=states.device) - groups.first[groups.seq]
        lo = table.first[groups.seq] + inside * run_length
        bounds = (lo, torch.minimum(lo + run_length, table.first[groups.seq + 1]))
        over = (groups.first[:-1], groups.first[1:])
    run_states = states.new_empty(runs, d_state, d_inner)
    run_sums = sums.new_empty(runs, d_inner)
    launch(states, sums, None, run_states, run_sums, runs, *bounds, n_chunks, runs_per_row, run_length, False)
    launch(run_states, run_sums, entry, last, None, rows, *over, runs_per_row, 1, runs_per_row, True)
    launch(states, sums, run_states, None, None, runs, *bounds, n_chunks, runs_per_row, run_length, True)
    return last


def wide_offsets(chunk_size: int, *row_strides: int) -> bool:
    """Whether an offset inside one chunk may need more than 32 bits."""
    return (chunk_size + 4) * max(abs(stride) for stride in row_strides) >= 2**31 - 2**22


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last axis is not contiguous: every other stride is passed to the kernels."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def aot_cases() -> list[AotCase]:
    """The carry over chunks, dense and packed, both directions."""
    return [
        AotCase(
            carry_kernel,
            f"{'packed' if packed else 'dense'} {'down' if descending else 'up'}",
            {
                "states_ptr": "*fp32",
                "sums_ptr": "*fp32",
                "a_ptr": "*fp32",
                "entry_ptr": "*fp32",
                "exit_ptr": "*fp32",
                "run_sums_ptr": "*fp32",
                "lo_ptr": "*i64" if packed else None,
                "hi_ptr": "*i64" if packed else None,
                "n_chunks": 128,
                "runs_per_row": 1,
                "run_length": 128,
                "d_inner": 2048,
                "d_state": 16,
                "tiles": 256,
                "PACKED": packed,
                "DESCENDING": descending,
                "WRITE": True,
                "FOURS": True,
                "BLOCK": CARRY_BLOCK,
                "DEPTH": CARRY_DEPTH,
            },
            num_warps=1,
        )
        for packed in (False, True)
        for descending in (False, True)
    ]

"""How the Triton selective scan is launched: one table by shape, no search at run time.

The table rests on d_state (rounded up to a power of two), the number of (batch, channel block) programs and
the length. The chunk size depends on d_state and the length alone, never on the device, so a backward finds
the chunks that its forward made and `boundaries_shape` can be told ahead of a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ssm_modal.kernels.sequences import Sequences

# Sequences are walked through in one pass where there are this many warps a multiprocessor without cutting
# time. At 16 cutting was still faster on an H200 (docs/performance.md).
SERIAL_WARPS = 32


@dataclass(frozen=True)
class ScanLaunch:
    """Launch parameters of forward and backward. A program is one warp.

    chunk_size: steps between saved states. serial: the forward walks through a sequence in one pass.
    run_length: chunks a run of the carry. block: channels of a program of the gradient kernel; fwd_block: of
    the others. fwd_steps: steps whose rows are loaded together; bwd_steps: steps whose states are rebuilt and
    kept at a time. fwd_registers, serial_registers, bwd_registers: registers a thread may take. bwd_programs:
    programs of the gradient kernel, each with a scratch of chunk_size / bwd_steps states; None for those that
    run at a time. bwd_splits: partial sums of dB and dC where torch asks for a deterministic result.
    polynomials, output_polynomials: of every 16 exponentials of a lane those that the kernels of the chunks
    and the output kernel compute without the exponential unit.
    """

    chunk_size: int
    serial: bool
    run_length: int
    block: int
    fwd_block: int
    fwd_steps: int
    fwd_registers: int | None
    serial_registers: int | None
    bwd_steps: int
    bwd_registers: int | None
    bwd_programs: int | None
    bwd_splits: int
    polynomials: int
    output_polynomials: int


# (d_state up to, chunk size, block, fwd_block, fwd_steps, fwd_registers, serial_registers, bwd_steps,
# bwd_registers). A multiprocessor's four parts hold 16,384 registers each: 128 a thread make sixteen
# programs, 168 twelve, 255 eight. All rows compile for sm_90 without a spill, which tests/kernels/test_aot.py
# keeps so.
SHIPPED: tuple[tuple[int, int, int, int, int, int | None, int | None, int, int | None], ...] = (
    (1, 128, 32, 32, 8, 96, 128, 4, 128),
    (2, 128, 32, 32, 8, 96, 128, 4, 128),
    (4, 128, 32, 32, 8, 96, 128, 4, 128),
    (8, 128, 32, 32, 8, 96, 128, 4, 168),
    (16, 128, 32, 32, 8, 128, 128, 4, 168),
    (32, 256, 16, 32, 4, 168, 255, 4, 168),
    (64, 256, 8, 16, 4, 168, 255, 4, 168),
    (128, 512, 4, 8, 4, 168, 255, 4, 168),
    (256, 512, 2, 4, 4, 168, 255, 4, 168),
)

# Gradient programs wanted on a multiprocessor where partial sums are not shared, before channels share one.
BWD_PROGRAMS = 32


def padded_state(d_state: int) -> int:
    """The next power of two: the extent of a tile of states."""
    return 1 << (d_state - 1).bit_length()


def chunk_size_for(d_state: int) -> int:
    """Steps a chunk. A saved state costs 4 * d_state bytes a channel: larger states are saved more rarely."""
    return next(row[1] for row in SHIPPED if d_state <= row[0])


# Bytes of shared memory of a multiprocessor of compute capability 9.0.
SHARED = 228 * 1024


def resident(registers: int | None, shared: int = 0, capacity: int = SHARED) -> int:
    """Programs of one warp that a multiprocessor runs at a time, by registers and bytes of shared memory.

    Each of its four parts has 16,384 registers, given out in units of 256 a warp. Of its `capacity` of shared
    memory 1 KiB is the system's, and a program costs 1 KiB more than it asks for.
    """
    per_warp = -(-(registers or 255) * 32 // 256) * 256
    return max(1, min(32, 4 * (16384 // per_warp), (capacity - 1024) // (shared + 1024)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H100 for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor."""
    if device.type != "cuda":
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.cache
def adds_vectors(device: torch.device) -> bool:
    """Whether a GPU adds four fp32 numbers to memory in one instruction: from compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def scan_launch(
    batch: int,
    length: int,
    d_inner: int,
    groups: int,
    d_state: int,
    device: torch.device,
    seqs: Sequences | None = None,
) -> ScanLaunch:
    """The launch for inputs (batch, length, d_inner), `groups` groups of B and C, packed with `seqs`."""
    if seqs is None:
        return _launch(batch, length, None, d_inner, groups, d_state, device)
    longest = max(seqs.lengths)
    # Packed sequences of very unequal length leave a serial launch waiting for the longest.
    even = longest * seqs.n <= 2 * length
    chunks = boundaries_shape(1, length, d_inner, d_state, groups, seqs.lengths)[0]
    return _launch(seqs.n if even else 0, longest, chunks, d_inner, groups, d_state, device)


@functools.lru_cache(maxsize=1024)
def _launch(
    rows: int, longest: int, chunks: int | None, d_inner: int, groups: int, d_state: int, device: torch.device
) -> ScanLaunch:
    """rows: sequences of about `longest` steps, 0 where they are uneven; chunks: None where they are even."""
    row = next(row for row in SHIPPED if d_state <= row[0])
    _, chunk, block, fwd_block, fwd_steps, fwd_registers, serial_registers, bwd_steps, bwd_registers = row
    count = multiprocessors(device)
    group_channels = max(1, d_inner // groups)
    warps = rows * groups * -(-group_channels // fwd_block)
    if chunks is None:
        chunks = rows * -(-longest // chunk)
    blocks = -(-group_channels // block)
    return ScanLaunch(
        chunk_size=chunk,
        serial=longest <= chunk or warps >= SERIAL_WARPS * count,
        run_length=128,
        block=block,
        fwd_block=fwd_block,
        fwd_steps=fwd_steps,
        fwd_registers=fwd_registers,
        serial_registers=serial_registers,
        bwd_steps=bwd_steps,
        bwd_registers=bwd_registers,
        bwd_programs=None,
        bwd_splits=min(blocks, -(-BWD_PROGRAMS * count // max(1, chunks * groups))),
        polynomials=1 if d_state <= 16 else 2,
        output_polynomials=0 if d_state <= 16 else 1,
    )


def shipped_launches() -> list[tuple[int, ScanLaunch]]:
    """Every row of the table as (d_state, launch), for ahead-of-time compilation."""
    cpu = torch.device("cpu")
    launches = [(row[0], scan_launch(8, 8192, 2048, 1, row[0], cpu)) for row in SHIPPED]
    return [(n, replace(launch, serial=serial)) for n, launch in launches for serial in (False, True)]


def boundaries_shape(
    batch: int,
    length: int,
    d_inner: int,
    d_state: int,
    groups: int,
    lengths: Sequence[int] | None,
    chunk_size: int | None = None,
) -> tuple[int, int, int]:
    """Shape of the states the forward saves for the backward: (chunks, d_state, d_inner).

    `lengths`: those of packed sequences, or None. `chunk_size` overrides the table's.
    """
    size = chunk_size_for(d_state) if chunk_size is None else chunk_size
    if lengths is None:
        return batch * -(-length // size), d_state, d_inner
    return sum(-(-n // size) for n in lengths), d_state, d_inner

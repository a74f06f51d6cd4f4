"""How the Triton convolution is launched: one table by shape, no search at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MAX_D_CONV = 16
"""The most taps that the Triton kernels take: more would not fit in registers."""


@dataclass(frozen=True)
class ConvLaunch:
    """Launch parameters of one kernel.

    steps: steps of time a program walks through. block_d, warps: channels and warps of a program; a thread
    holds block_d / (32 * warps) neighbouring channels. unroll: steps whose loads are under way at a time; it
    divides `steps`. registers: those that a thread may take, None for what the compiler likes.
    """

    steps: int
    block_d: int
    warps: int
    unroll: int
    registers: int | None


# (taps up to, channels a thread, steps unrolled and registers: forward, backward). Four channels of two
# bytes, a load of 8 bytes, were faster than eight on an H200. A thread keeps 2 * taps (backward 4 * taps)
# numbers a channel; 128 registers a thread make sixteen warps a multiprocessor. All rows compile for sm_90
# without a spill, which tests/kernels/test_aot.py keeps so.
Row = tuple[int, int, int | None]
SHIPPED: tuple[tuple[int, Row, Row], ...] = (
    (4, (4, 8, None), (4, 4, 128)),
    (8, (4, 4, None), (4, 4, None)),
    (16, (4, 4, None), (2, 4, None)),
)

# Programs wanted before one walks further, as found on an H200: many rounds of what it holds, so that the
# last one is short. Backward a walk costs d_conv - 1 steps at either end and a row of partial sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 16000, 2100

SHORTEST, LONGEST = 32, 1024


@functools.lru_cache(maxsize=512)
def conv_launch(rows: int, d_inner: int, taps: int, backward: bool, itemsize: int = 2) -> ConvLaunch:
    """The launch for `rows` (batch times length) positions of `d_inner` channels and `taps` weights each.

    itemsize: bytes of an input; those of four take more registers than the table allows.
    """
    _, forward_row, backward_row = next(row for row in SHIPPED if taps <= row[0])
    channels, unroll, registers = backward_row if backward else forward_row
    if itemsize > 2:
        registers = None
    block_d = min(32 * channels, max(16, 1 << (d_inner - 1).bit_length()))
    blocks = -(-d_inner // block_d)
    programs = BACKWARD_PROGRAMS if backward else FORWARD_PROGRAMS
    steps = SHORTEST
    while steps < LONGEST and rows * blocks >= 2 * steps * programs:
        steps *= 2
    return ConvLaunch(steps=steps, block_d=block_d, warps=1, unroll=unroll, registers=registers)

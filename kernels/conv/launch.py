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
    divides `steps`.
    """

    steps: int
    block_d: int
    warps: int
    unroll: int


# (taps up to, channels a thread and steps unrolled: forward, backward). Four channels of two bytes, a load of
# 8 bytes, were faster than eight on an H200. A thread keeps 2 * taps (backward 4 * taps) numbers a channel;
# all rows compile for sm_90 without a spill, which tests/kernels/test_aot.py keeps so.
SHIPPED: tuple[tuple[int, tuple[int, int], tuple[int, int]], ...] = (
    (4, (4, 8), (4, 4)),
    (8, (4, 4), (4, 4)),
    (16, (4, 4), (2, 4)),
)

# Programs wanted before one walks further, as found on an H200: many rounds of what it holds, so that the
# last one is short. Backward a walk costs d_conv - 1 steps at either end and a row of partial sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 16000, 2100

SHORTEST, LONGEST = 32, 1024


@functools.lru_cache(maxsize=512)
def conv_launch(rows: int, d_inner: int, taps: int, backward: bool) -> ConvLaunch:
    """The launch for `rows` (batch times length) positions of `d_inner` channels and `taps` weights each."""
    _, forward_row, backward_row = next(row for row in SHIPPED if taps <= row[0])
    channels, unroll = backward_row if backward else forward_row
    block_d = min(32 * channels, max(16, 1 << (d_inner - 1).bit_length()))
    blocks = -(-d_inner // block_d)
    programs = BACKWARD_PROGRAMS if backward else FORWARD_PROGRAMS
    steps = SHORTEST
    while steps < LONGEST and rows * blocks >= 2 * steps * programs:
        steps *= 2
    return ConvLaunch(steps=steps, block_d=block_d, warps=1, unroll=unroll)

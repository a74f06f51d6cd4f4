"""How the Triton norm is launched: by the width of a row, no search at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

WHOLE = 8192
"""Channels up to which a row stays in registers and is read once."""


@dataclass(frozen=True)
class NormLaunch:
    """Launch parameters of one kernel.

    block: channels of a tile. one: whether a row fits in it. rows, warps: of a tile; 1 row where not `one`.
    """

    block: int
    one: bool
    rows: int
    warps: int


# Elements of a tile in one thread, forward and backward (each is several fp32 numbers), and the fewest of
# a tile. Sixteen are two loads of 16 bytes in half precision.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS, SMALLEST_TILE = 8, 16, 512

# Warps of the backward wanted on a multiprocessor: about what its registers hold.
BACKWARD_WARPS = 16


def norm_launch(width: int, backward: bool, gated: bool) -> NormLaunch:
    """The launch for rows of `width` channels, with or without a gate."""
    return _norm_launch(width, backward, gated, WHOLE)


@functools.lru_cache(maxsize=256)
def _norm_launch(width: int, backward: bool, gated: bool, whole: int) -> NormLaunch:
    # The widest rows leave a backward no registers for a gate, nor for loads of odd width.
    if backward and (gated or width % 16):
        whole //= 2
    one = width <= whole
    # Rows in several blocks keep two loops' addresses: a smaller block leaves them the registers.
    block = 1 << (width - 1).bit_length() if one else max(16, whole // 4)
    rows = max(1, SMALLEST_TILE // block) if one else 1
    elements = BACKWARD_ELEMENTS if backward else FORWARD_ELEMENTS
    return NormLaunch(block, one, rows, max(1, min(16, rows * block // (32 * elements))))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def backward_programs(rows: int, groups: int, launch: NormLaunch, device: torch.device) -> int:
    """Programs a group of the backward: what runs at a time, and no more than one for every two tiles."""
    most = BACKWARD_WARPS // launch.warps * _multiprocessors(device) // groups
    return max(1, min(most, -(-rows // (2 * launch.rows))))


# Shapes of the ahead-of-time cases, (dim, residual, gate).
AOT_SHAPES: tuple[tuple[int, bool, str | None], ...] = (
    (16, False, None),
    (256, False, None),
    (1024, True, None),
    (4096, True, "last"),
    (8192, True, None),
    (4095, True, "first"),
    (12289, True, "first"),
)

"""In which order the patches of an image are scanned, as index maps.

    row      left to right, top to bottom, as published (arXiv 2401.09417)
    column   top to bottom, left to right
    snake    by rows, every second one from right to left, so that neighbours in the sequence are neighbours
    cross    four ways: blocks take turns between row and column, both directions each (as Mamba-ND,
             arXiv 2402.05892)

A map holds, for each place of the sequence, the number of the patch that stands there, patches being
numbered by rows. A class token keeps its place in the sequence whatever the order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

ScanOrder = Literal["row", "column", "snake", "cross"]
Grid = tuple[int, int]

# The orders that the blocks take in turn.
BLOCK_ORDERS: dict[str, tuple[str, ...]] = {
    "row": ("row",),
    "column": ("column",),
    "snake": ("snake",),
    "cross": ("row", "column"),
}


def patch_order(order: str, grid: Grid) -> Tensor:
    """(rows * columns,) int64: which patch stands at each place of the sequence.

    order: "row", "column" or "snake"; grid: (rows, columns).
    """
    numbers = torch.arange(grid[0] * grid[1], device="cpu").view(grid)
    if order == "row":
        return numbers.flatten()
    if order == "column":
        return numbers.T.flatten()
    if order == "snake":
        numbers[1::2] = numbers[1::2].flip(1)
        return numbers.flatten()
    raise ValueError(f"order is {order!r}, expected row, column or snake")


def token_order(order: str, grid: Grid, slot: int | None) -> Tensor:
    """`patch_order` over all tokens: a class token stays at `slot` of the sequence; None: there is none."""
    patches = patch_order(order, grid)
    if slot is None:
        return patches
    shifted = patches + (patches >= slot)  # the numbers of the patches among the tokens
    return torch.cat([shifted[:slot], torch.tensor([slot], device="cpu"), shifted[slot:]])


@lru_cache(maxsize=64)
def reordering(
    before: str, after: str, grid: Grid, slot: int | None, device: torch.device | None = None
) -> Tensor | None:
    """(tokens,) int64: the places in a sequence in the order `before` from which one in the order `after`
    takes its tokens; None where nothing moves."""
    if before == after:
        return None
    # What is kept serves training too, though the first to ask for it may be an evaluation.
    with torch.inference_mode(False):
        place = token_order(before, grid, slot).argsort()  # of each token in `before`
        return place[token_order(after, grid, slot)].to(device)

"""Intervals for a share of right answers where neighbouring answers are not independent."""

from __future__ import annotations

import torch
from torch import Tensor


def block_bootstrap(
    right: Tensor, blocks: Tensor, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean of `right` over resampled blocks (Kuensch 1989, doi
    10.1214/aos/1176347265, with blocks that are given).

    right: bool (n,), one an answer. blocks: int64 (n,), the block of each, 0 to b - 1; answers of one block
    are drawn together, whole. Returns (low, high); raises ValueError for no answer or other shapes.
    """
    if right.ndim != 1 or right.shape != blocks.shape or not len(right):
        raise ValueError(
            f"right has shape {tuple(right.shape)} and blocks {tuple(blocks.shape)}, expected one (n,), n > 0"
        )
    n = int(blocks.max()) + 1
    hits = torch.zeros(n, dtype=torch.float64).index_add_(0, blocks, right.double())
    sizes = torch.bincount(blocks, minlength=n).double()
    drawn = torch.randint(n, (samples, n), generator=torch.Generator().manual_seed(seed))
    # A block may hold nothing; a sample of such alone says nothing.
    total = sizes[drawn].sum(1)
    means = (hits[drawn].sum(1) / total)[total > 0]
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high

"""Matthews' correlation coefficient of a confusion matrix, and its bootstrap interval."""

from __future__ import annotations

import torch
from torch import Tensor


def mcc(matrices: Tensor) -> Tensor:
    """Matthews' correlation coefficient of confusion matrices (..., n, n) int64, a row a true class: (...)
    float64, for more than two classes Gorodkin's R_K (Comput. Biol. Chem. 28, 2004).

    0 where all sequences are of one class or predicted to be, as scikit-learn has it (torchmetrics returns
    another number there).
    """
    wide = matrices.double()
    true, predicted = wide.sum(-1), wide.sum(-2)
    total, right = true.sum(-1), wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    top = right * total - (true * predicted).sum(-1)
    bottom = (total.square() - true.square().sum(-1)) * (total.square() - predicted.square().sum(-1))
    return torch.where(bottom > 0, top / bottom.clamp(min=1).sqrt(), torch.zeros_like(top))


def mcc_interval(
    matrix: Tensor, resamplings: int, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval (percentiles) of the MCC: as many sequences drawn with replacement as there are.

    matrix: (n, n) int64. Drawing sequences is drawing cells of the matrix by their counts. seed: of the
    draws, so that the same matrix gives the same interval.
    """
    import numpy as np

    counts = matrix.flatten().double().numpy()
    drawn = np.random.default_rng(seed).multinomial(int(matrix.sum()), counts / counts.sum(), resamplings)
    values = mcc(torch.from_numpy(drawn).view(resamplings, *matrix.shape))
    tail = (1.0 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1.0 - tail]).double()).tolist()
    return low, high

"""The picture of a track along a region."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.plots.figure import new_figure, png

_POINTS = 2000  # more bases than this are drawn as means and ranges of `_BINS` bins
_BINS = 400


def track_plot(
    values: Tensor, contig: str, start: int, label: str, *, reference: float | None = None, dpi: int = 150
) -> bytes:
    """A track along a region: float (n,), value i of base `start` + i (0-based); NaN leaves a gap.

    label: of the vertical axis. reference: a value drawn as a dashed line, such as that of guessing. Regions
    of many bases show the mean of bins, with the range from the 5th to the 95th percentile shaded.
    """
    figure = new_figure(11.0, 3.2)
    axes = figure.add_subplot()
    wide = values.double()
    n = wide.shape[0]
    if n <= _POINTS:
        at = start + 1 + torch.arange(n)
        axes.step(at, wide, where="mid", color="#1f77b4", linewidth=0.8)
    else:
        size = -(-n // _BINS)
        binned = F.pad(wide, (0, -n % size), value=float("nan")).view(-1, size)
        at = start + 1 + size * torch.arange(binned.shape[0]) + size / 2
        low, high = (torch.nanquantile(binned, q, dim=1) for q in (0.05, 0.95))
        axes.fill_between(at, low, high, color="#1f77b4", alpha=0.2, linewidth=0, label="5 to 95 %")
        axes.plot(at, binned.nanmean(1), color="#1f77b4", linewidth=1.0, label=f"mean of {size:,} bases")
    if reference is not None:
        axes.axhline(reference, color="0.5", linestyle="--", linewidth=0.8, label="uniform guess, -ln 4")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper right", framealpha=0.9)
    axes.set_xlim(start + 0.5, start + n + 0.5)
    axes.set_xlabel("position (1-based)")
    axes.set_ylabel(label)
    axes.set_title(f"{contig}:{start + 1:,}-{start + n:,}", fontsize=10)
    plain_positions(axes)
    return png(figure, dpi)


def plain_positions(axes: Any) -> None:
    """Whole positions with commas below `axes`, few enough to read."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))

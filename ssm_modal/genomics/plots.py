"""Pictures of tracks along a region and of in-silico mutagenesis, as PNG."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.genomics.mutagenesis import Mutations
from ssm_modal.tokenizers.dna import BASES

_POINTS = 2000  # more bases than this are drawn as means and ranges of bins
_LETTERS = 150  # up to this many bases have their letter below the picture


def track_plot(
    values: Tensor, contig: str, start: int, label: str, *, reference: float | None = None, dpi: int = 150
) -> bytes:
    """A track along a region: float (n,), value i of base `start` + i (0-based); NaN leaves a gap.

    label: of the vertical axis. reference: a value drawn as a dashed line, such as that of guessing. Regions
    of many bases show the mean of bins, with the range from the 5th to the 95th percentile shaded.
    """
    figure, axes = _figure(11.0, 3.2)
    wide = values.double()
    n = wide.shape[0]
    if n <= _POINTS:
        at = start + 1 + torch.arange(n)
        axes.plot(at, wide, color="#1f77b4", linewidth=0.8, marker="." if n <= 300 else "", markersize=3)
    else:
        size = -(-n // (_POINTS // 2))
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
    _plain_positions(axes)
    return _png(figure, dpi)


def mutation_plot(mutations: Mutations, *, dpi: int = 150) -> bytes:
    """A heat map of the effects: a column a base, a row a letter put in its place; dots are the region's
    own letters. Below it the mean effect of the three substitutions at each base."""
    n = len(mutations.letters)
    figure, (axes, below) = _figure(min(24.0, max(7.0, 0.11 * n + 2.5)), 4.2, rows=2)
    effects = mutations.effects
    known = effects[~effects.isnan()].abs()
    # The scale ends at the 99th percentile, so that one base does not bleach the others.
    limit = max(1e-6, float(known.kthvalue(max(1, int(0.99 * len(known)))).values) if len(known) else 0.0)
    left, right = mutations.start + 0.5, mutations.start + n + 0.5
    image = axes.imshow(
        effects.T.numpy(),
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, 3.5, -0.5),
    )
    image.cmap.set_bad("0.85")
    axes.set_yticks(range(len(BASES)), list(BASES))
    own = [(i, BASES.index(letter)) for i, letter in enumerate(mutations.letters) if letter in BASES]
    if own and n <= 1000:
        axes.plot(
            [mutations.start + 1 + i for i, _ in own],
            [row for _, row in own],
            linestyle="",
            marker="o",
            color="0.3",
            markersize=min(4.0, max(0.8, 300 / n)),
        )
    axes.set_ylabel("substituted by")
    axes.set_title(
        f"{mutations.contig}:{mutations.start + 1:,}-{mutations.start + n:,}   log P(alternative) - log "
        "P(reference), dots: reference",
        fontsize=10,
    )
    figure.colorbar(image, ax=[axes, below], label="effect (nats)", fraction=0.03, pad=0.01, extend="both")
    mean = mutations.mean_effect()
    at = mutations.start + 1 + torch.arange(n)
    below.bar(at, mean.nan_to_num(), width=1.0, color=["#b2182b" if v < 0 else "#2166ac" for v in mean])
    below.axhline(0, color="0.4", linewidth=0.6)
    below.set_ylabel("mean (nats)")
    for one in (axes, below):
        one.set_xlim(left, right)
        _plain_positions(one)
    if n <= _LETTERS:
        axes.set_xticks(at.tolist(), list(mutations.letters), fontsize=7)
        axes.tick_params(axis="x", length=0)
    below.set_xlabel("position (1-based)")
    return _png(figure, dpi)


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [2, 1] if rows == 2 else None
    return figure, figure.subplots(rows, 1, height_ratios=ratios)


def _plain_positions(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _png(figure: Any, dpi: int) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()

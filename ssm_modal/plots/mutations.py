"""The picture of in-silico mutagenesis."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ssm_modal.plots.figure import new_figure, png
from ssm_modal.plots.tracks import plain_positions

BASES = "ACGT"
_LETTERS = 150  # up to this many bases have their letter below the picture


def mutation_plot(effects: Tensor, letters: str, contig: str, start: int, *, dpi: int = 150) -> bytes:
    """A heat map of the effects: a column a base, a row a letter put in its place; dots are the region's
    own letters. Below it the mean effect of the three substitutions at each base.

    effects: float (n, 4), in nats, of A, C, G, T at each of the `letters`; 0 for its own, NaN where it is not
    known. start: 0-based.
    """
    n = len(letters)
    figure = new_figure(min(24.0, max(7.0, 0.11 * n + 2.5)), 4.2)
    axes, below = figure.subplots(2, 1, height_ratios=[2, 1])
    known = effects[~effects.isnan()].abs()
    # The scale ends at the 99th percentile, so that one base does not bleach the others.
    limit = max(1e-6, float(known.kthvalue(max(1, int(0.99 * len(known)))).values) if len(known) else 0.0)
    colors = import_module("matplotlib").colormaps["RdBu"].with_extremes(bad="0.85")
    left, right = start + 0.5, start + n + 0.5
    image = axes.imshow(
        effects.T.numpy(),
        cmap=colors,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, 3.5, -0.5),
    )
    axes.set_yticks(range(len(BASES)), list(BASES))
    own = [(i, BASES.index(letter)) for i, letter in enumerate(letters) if letter in BASES]
    if own and n <= 1000:
        axes.plot(
            [start + 1 + i for i, _ in own],
            [row for _, row in own],
            linestyle="",
            marker="o",
            color="0.3",
            markersize=min(4.0, max(0.8, 300 / n)),
        )
    axes.set_ylabel("substituted by")
    axes.set_title(
        f"{contig}:{start + 1:,}-{start + n:,}   log P(alternative) - log P(reference), dots: reference",
        fontsize=10,
    )
    figure.colorbar(image, ax=[axes, below], label="effect (nats)", fraction=0.03, pad=0.01, extend="both")
    mean = effects.sum(1) / 3
    at = start + 1 + torch.arange(n)
    below.bar(at, mean.nan_to_num(), width=1.0, color=["#b2182b" if v < 0 else "#2166ac" for v in mean])
    below.axhline(0, color="0.4", linewidth=0.6)
    below.set_ylabel("mean (nats)")
    for one in (axes, below):
        one.set_xlim(left, right)
        plain_positions(one)
    if n <= _LETTERS:
        axes.set_xticks(at.tolist(), list(letters), fontsize=7)
        axes.tick_params(axis="x", length=0)
    below.set_xlabel("position (1-based)")
    return png(figure, dpi)

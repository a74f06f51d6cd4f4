"""Relevance of input positions over what they are positions of: a waveform, tokens, a track, an image.

Colours: where there are negative values red speaks for and blue against, with white at zero; otherwise from
white to red. The scale ends at the greatest absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

COLUMNS = 80  # characters a line of tokens
MOST_TOKENS = 2000  # of more, a track is drawn
_AXES = 0.8  # of a panel's width, what its axes take at least


def draw_waveform_relevance(
    panel: Figure | SubFigure, waveform: Tensor, relevance: Tensor, sample_rate: int
) -> None:
    """Draw `waveform` (n,) over time in s, coloured by its relevance, and the relevance under it, summed over
    the samples of a pixel.

    relevance: (n,), or (steps,) where a step stands for n / steps samples, rounded up.
    """
    wave = waveform.detach().float().cpu()
    n = wave.shape[0]
    size, edges, sums = _binned(relevance, n, panel)
    # A line from the lowest to the highest sample of each pixel, up to where the next one begins.
    next_first = torch.cat([wave[size::size], wave[-1:]])
    low = torch.minimum(-_blocks(-wave, size, -torch.inf).amax(1), next_first)
    high = torch.maximum(_blocks(wave, size, -torch.inf).amax(1), next_first)
    seconds = (edges[:-1] + edges[1:]) / 2 / sample_rate
    above, below = panel.subplots(2, 1, sharex=True)
    colors, norm = _scale(sums)
    thin = 0.004  # never of no height at all
    above.vlines(
        seconds.numpy(),
        (low - thin).numpy(),
        (high + thin).numpy(),
        colors=colors(norm(sums.numpy())),
        linewidth=0.9,
    )
    above.set_ylabel("amplitude", fontsize=7)
    above.set_facecolor("0.93")  # white stands for no relevance, and is to be seen
    _bars(below, seconds, sums, (edges[1] - edges[0]).item() / sample_rate)
    below.set_xlabel("s", fontsize=7)
    for axes in (above, below):
        axes.tick_params(labelsize=6)


def draw_track(
    panel: Figure | SubFigure, relevance: Tensor, *, start: int = 0, unit: str = "position"
) -> None:
    """Draw relevance (n,) over positions from `start` on, summed over the positions of a pixel."""
    size, edges, sums = _binned(relevance, relevance.shape[0], panel)
    axes = panel.subplots()
    _bars(axes, start + (edges[:-1] + edges[1:]) / 2 - 0.5, sums, float(size))
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=7)


def draw_tokens(
    panel: Figure | SubFigure, tokens: Sequence[str], relevance: Tensor, *, start: int = 0
) -> None:
    """Draw tokens, each on its colour, in lines of 80 characters with the number of their first token before
    them, counted from `start`; a token of more characters is cut. Of more than 2,000 tokens the relevance
    alone is drawn, over their numbers.

    tokens: what is to be read of each, printable. relevance: (len(tokens),).
    """
    if len(tokens) != relevance.shape[0]:
        raise ValueError(f"tokens has {len(tokens)} entries, expected {relevance.shape[0]}, one a position")
    if len(tokens) > MOST_TOKENS:
        draw_track(panel, relevance, start=start, unit="token")
        return
    from matplotlib.patches import Rectangle

    values = relevance.detach().float().cpu()
    colors, norm = _scale(values)
    axes = panel.subplots()
    width = panel.get_figure(root=True).get_size_inches()[0] * 72 / (COLUMNS + 10)  # points a character
    line, column = 0, 0
    for i, (token, value) in enumerate(zip(tokens, values.tolist())):
        shown = token[:COLUMNS] or " "
        if column + len(shown) > COLUMNS:
            line, column = line + 1, 0
        if column == 0:
            axes.text(-1, line, f"{start + i}", ha="right", va="center", fontsize=0.9 * width, color="0.5")
        rgba = colors(norm(value))
        axes.add_patch(Rectangle((column, line - 0.5), len(shown), 1, facecolor=rgba, edgecolor="none"))
        # 0.6 of its size is what a character of a monospaced font takes.
        axes.text(
            column + len(shown) / 2,
            line,
            shown,
            ha="center",
            va="center",
            family="monospace",
            fontsize=width / 0.65,
            color="black" if sum(rgba[:3]) > 1.3 else "white",
            parse_math=False,
        )
        column += len(shown)
    axes.set_xlim(-7, COLUMNS + 1)
    axes.set_ylim(line + 0.6, -0.6)
    axes.axis("off")


def token_lines(tokens: Sequence[str]) -> int:
    """How many lines `draw_tokens` takes for them at most."""
    return 2 + sum(min(max(len(token), 1), COLUMNS) for token in tokens) // (COLUMNS // 2)


def draw_image_relevance(panel: Figure | SubFigure, image: Tensor, relevance: Tensor) -> None:
    """Draw `image` and, beside it, the relevance over its grey shadow and the scale below.

    image: (height, width, channels), 1 or 3 of them, from 0 to 1. relevance: (rows, columns) of pixels or of
    patches, laid over the whole image.
    """
    from matplotlib.ticker import MaxNLocator

    shown = image.detach().float().cpu().clamp(0, 1)
    grey = shown.mean(-1).numpy()
    values = relevance.detach().float().cpu()
    colors, norm = _scale(values)
    left, right = panel.subplots(1, 2)
    left.imshow(shown.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    height, width = shown.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    right.imshow(grey, cmap="gray", vmin=-0.5, vmax=1.5, extent=extent)
    over = right.imshow(
        values.numpy(), cmap=colors, norm=norm, alpha=0.65, extent=extent, interpolation="nearest"
    )
    bar = panel.colorbar(
        over, ax=[left, right], location="bottom", shrink=0.6, aspect=20, ticks=MaxNLocator(5)
    )
    bar.set_label("relevance", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])


def _binned(relevance: Tensor, n: int, panel: Figure | SubFigure) -> tuple[int, Tensor, Tensor]:
    """(positions a bin, the bins' edges (bins + 1,), summed relevance (bins,)) for n positions, no bin
    narrower than a pixel of `panel`: a narrower bar might not be seen."""
    bins = max(1, int(_AXES * panel.bbox.width))
    values = relevance.detach().float().cpu()
    steps = values.shape[0]
    stride = -(-n // steps)
    size = max(1, -(-n // bins))
    size = -(-size // stride) * stride  # whole steps in each bin
    sums = _blocks(values, size // stride, 0.0).sum(1)
    edges = torch.arange(sums.shape[0] + 1) * float(size)
    return size, edges, sums


def _blocks(values: Tensor, size: int, fill: float) -> Tensor:
    """(n,) to (ceil(n / size), size), filled up with `fill`."""
    return F.pad(values, (0, -values.shape[0] % size), value=fill).view(-1, size)


def _scale(values: Tensor) -> tuple[Any, Any]:
    """A colour map and the norm that takes values to it."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    top = float(values.abs().max()) if values.numel() else 0.0
    top = top if top > 0 else 1.0
    if bool((values < 0).any()):
        return colormaps["bwr"], Normalize(-top, top)
    return colormaps["Reds"], Normalize(0.0, top)


def _bars(axes: Any, centres: Tensor, sums: Tensor, width: float) -> None:
    axes.bar(
        centres.numpy(),
        sums.numpy(),
        width=width,
        color=["firebrick" if v >= 0 else "royalblue" for v in sums],
    )
    axes.axhline(0.0, color="0.6", linewidth=0.5)
    axes.set_ylabel("relevance", fontsize=7)

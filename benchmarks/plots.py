"""Plots of a run's figures. `python -m benchmarks.plots FOLDER` draws those of FOLDER/figures.csv again.

<case>.png    time and peak memory against length, for each case measured along it
ratios.png    the time of each peer as a multiple of ours
bars.png      ours as a share of what is asked for
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import Row, read_figures

COLOURS = ("#1a5fb4", "#e66100", "#26a269", "#813d9c", "#a51d2d", "#5e5c64")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(found: Iterable[Row], folder: Path) -> list[Path]:
    """Every plot that the rows allow, into `folder`; returns their paths. Needs matplotlib."""
    rows = list(found)
    written = []
    along = list(dict.fromkeys(row.case for row in rows if row.length is not None))
    for case in along:
        written.append(_against_length([row for row in rows if row.case == case], folder / f"{case}.png"))
    single = [row for row in rows if row.length is None]
    peers = [row for row in single if not row.ours and row.unit == "ms" and row.times_ours is not None]
    if peers:
        written.append(_ratios(peers, folder / "ratios.png"))
    asked = [row for row in single if row.ours and row.at_most]
    if asked:
        written.append(_bars(asked, folder / "bars.png"))
    return written


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each entry, ours first."""
    names = dict.fromkeys([r.who for r in rows if r.ours] + [r.who for r in rows])
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _against_length(rows: list[Row], path: Path) -> Path:
    whats = list(dict.fromkeys(row.what for row in rows))
    colours = _colours(rows)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(whats), figsize=(5.2 * len(whats), 4.2), squeeze=False)
    for ax, what in zip(axes[0], whats):
        for who, colour in colours.items():
            points = sorted(
                (r.length or 0, r.median, r.low, r.high) for r in rows if (r.what, r.who) == (what, who)
            )
            if not points:
                continue
            lengths, medians, lows, highs = zip(*points)
            ax.plot(lengths, medians, marker="o", markersize=3.5, linewidth=1.4, color=colour, label=who)
            ax.fill_between(lengths, lows, highs, color=colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("length")
        ax.set_ylabel(next(row.unit for row in rows if row.what == what))
        ax.set_title(what, fontsize=10)
        ax.grid(True, which="major", alpha=0.3)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(rows[0].case, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _ratios(rows: list[Row], path: Path) -> Path:
    labels = [f"{row.case}: {row.what}\nbeside {row.who}" for row in rows]
    values = [row.times_ours or 0.0 for row in rows]
    return _horizontal(
        labels, values, "time as a multiple of ours (right of the line: ours is faster)", path, log=True
    )


def _bars(rows: list[Row], path: Path) -> Path:
    labels = [f"{row.case}: {row.what}\n{row.shape}" for row in rows]
    values = [row.median / row.at_most if row.at_most else 0.0 for row in rows]
    label = "share of what is asked for (left of the line: met)"
    return _horizontal(
        labels, values, label, path, colour=["#26a269" if row.met else "#c01c28" for row in rows]
    )


def _horizontal(
    labels: list[str],
    values: list[float],
    xlabel: str,
    path: Path,
    *,
    log: bool = False,
    colour: str | list[str] = COLOURS[0],
) -> Path:
    pyplot = _pyplot()
    figure, ax = pyplot.subplots(figsize=(8.5, 1.0 + 0.42 * len(labels)))
    places = list(range(len(labels)))[::-1]
    start = 1.0 if log else 0.0
    ax.barh(places, [value - start for value in values], left=start, height=0.62, color=colour)
    for place, value in zip(places, values):
        ax.annotate(
            f"{value:.2f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    ax.axvline(1.0, color="black", linewidth=0.9)
    if log:
        ax.set_xscale("log")
        for axis_format in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            axis_format(lambda value, _: f"{value:g}")
    ax.margins(x=0.12)
    ax.set_ylim(-0.7, len(labels) - 0.3)
    ax.set_yticks(places, labels, fontsize=7.5)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.grid(True, axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=140, bbox_inches="tight")
    pyplot.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    """Draw a folder's figures again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a folder that a run of the benchmarks wrote")
    folder = parser.parse_args(argv).folder
    if not (folder / "figures.csv").is_file():
        parser.error(f"{folder}: there is no figures.csv in it")
    for path in draw(read_figures(folder / "figures.csv"), folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""bedGraph: one number a base along a region, for genome browsers (UCSC, IGV)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_modal.io.atomic import atomic_write


@dataclass(frozen=True)
class Track:
    """values[i] belongs to base `start` + i (0-based) of `contig`; NaN where there is none."""

    contig: str
    start: int
    values: Sequence[float]


def write_bedgraph(
    path: str | os.PathLike[str], name: str, tracks: Iterable[Track], *, digits: int = 5
) -> Path:
    """Write `tracks` to `path`, whole or not at all: lines of contig, start, end (0-based, half-open), value.

    Neighbouring bases of one value (to `digits` significant digits) share a line; bases without a value have
    none. name: what the browser calls the track.
    """
    lines = [f'track type=bedGraph name="{name}"']
    for track in tracks:
        begin, shown = track.start, ""
        # The NaN behind the last value ends its run.
        for at, value in enumerate([*track.values, math.nan], track.start):
            text = "" if math.isnan(value) else f"{value:.{digits}g}"
            if text != shown:
                if shown:
                    lines.append(f"{track.contig}\t{begin}\t{at}\t{shown}")
                begin, shown = at, text
    return atomic_write(path, "\n".join(lines) + "\n")

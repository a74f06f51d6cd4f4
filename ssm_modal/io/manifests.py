"""Manifests: recordings and their labels in a CSV file with a header."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

from ssm_modal.errors import nearest
from ssm_modal.io.audio import AudioError
from ssm_modal.io.recordings import SPLITS, Found, LeftOut, Recording
from ssm_modal.io.text import expand_path

COLUMNS = ("path", "label", "start", "end", "split", "speaker")


class ManifestError(AudioError):
    """A manifest that cannot be used; the message names the file and the line."""


def read_manifest(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    labelled: bool = True,
    skip_bad: bool = False,
) -> Found:
    """The recordings listed in the CSV file `path` (UTF-8, with a header), in its order.

    Columns: `path` (relative to `root`, by default the manifest's folder, or absolute), `label`, and as
    needed `start` and `end` (seconds), `split` ("train", "validation" or "test") and `speaker`; an empty cell
    says nothing.

    labelled: every line must have a label.
    skip_bad: lines with a fault are left out and listed. Faults of the header are errors in any case.

    Raises FileNotFoundError for a missing manifest, ManifestError naming the line for a column that is
    unknown, lacking or twice there, a line with too many or too few cells, a file that is not there, a
    missing label, a part that is no span of time, an unknown split, and for a manifest without a line.
    """
    file = expand_path(path, "manifest")
    if not file.is_file():
        raise FileNotFoundError(f"manifest is {str(file)!r}: there is no such file")
    base = file.parent if root is None else expand_path(root, "root")
    found = Found([])
    with open(file, encoding="utf-8-sig", newline="") as source:
        try:
            lines = csv.reader(source, strict=True)
            columns = _header(file, next(lines, []), labelled)
            for cells in lines:
                if not cells:
                    continue
                try:
                    found.recordings.append(_recording(file, lines.line_num, columns, cells, base, labelled))
                except ManifestError as error:
                    if not skip_bad:
                        raise
                    name = cells[columns.index("path")] if len(cells) == len(columns) else ""
                    found.left_out.append(LeftOut(base / name if name else file, error.problem))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(file, f"is no CSV file in UTF-8: {error}") from error
    if not found.recordings and not found.left_out:
        raise ManifestError(file, "line 2: there is none, expected at least one recording below the header")
    return found


def _header(file: Path, cells: list[str], labelled: bool) -> list[str]:
    columns = [cell.strip() for cell in cells]
    for column in columns:
        if column not in COLUMNS:
            raise ManifestError(file, f"line 1: unknown column {column!r}; {nearest(column, COLUMNS)}")
        if columns.count(column) > 1:
            raise ManifestError(file, f"line 1: the column {column!r} is there twice")
    for needed in ("path", "label") if labelled else ("path",):
        if needed not in columns:
            raise ManifestError(
                file,
                f"line 1: the column {needed!r} is missing, expected {', '.join(COLUMNS)}",
            )
    return columns


def _recording(
    file: Path, line: int, columns: list[str], cells: list[str], base: Path, labelled: bool
) -> Recording:
    def wrong(problem: str) -> ManifestError:
        return ManifestError(file, f"line {line}: {problem}")

    if len(cells) != len(columns):
        raise wrong(f"{len(cells)} cells, expected {len(columns)} ({', '.join(columns)})")
    row = {column: cell.strip() for column, cell in zip(columns, cells)}
    if not row["path"]:
        raise wrong("the path is empty, expected that of a recording")
    audio = base / row["path"]
    if not audio.is_file():
        raise wrong(f"{str(audio)!r}: there is no such file")
    label = row.get("label") or None
    if labelled and label is None:
        raise wrong(f"the label of {row['path']!r} is missing")
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise wrong(f"the split is {split!r}, expected one of {', '.join(SPLITS)}")
    times = {}
    for name in ("start", "end"):
        if text := row.get(name):
            try:
                times[name] = float(text)
            except ValueError:
                raise wrong(f"the {name} is {text!r}, expected seconds") from None
    start, end = times.get("start", 0.0), times.get("end")
    if not (0.0 <= start < math.inf) or (end is not None and not start < end < math.inf):
        raise wrong(f"the part from {start} to {end} s is no span of time")
    return Recording(audio, label, split, start, end, row.get("speaker") or None)

"""Intervals and features from BED (0-based, half-open) and GFF3 or GTF (1-based, the end included).

Both come as `Region`: 0-based, half-open. Lines with a fault are errors that name file and line, or with
`skip_bad` are left out and listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ssm_modal.io.genome import Genome
from ssm_modal.io.nucleotides import GenomeError, open_text
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.regions import Region, Strand
from ssm_modal.io.text import expand_path

FEATURE_SUFFIXES = (".gff", ".gff3", ".gtf")
_GFF3 = re.compile(r"\s*[^=;\s\"]+=")
_GTF = re.compile(r'\s*(?P<key>[^\s;"]+)\s+(?:"(?P<quoted>[^"]*)"|(?P<plain>[^;"\s]+))\s*(?:;|$)')


@dataclass
class FoundRegions:
    """The regions of a file in its order, and what was left out of it."""

    regions: list[Region]
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True)
class Feature:
    """One line of GFF3 or GTF. region: 0-based, half-open; a strand of "." or "?" reads as "+".

    stranded: whether the line gives a strand. score, phase: None where it gives none. attributes: as text,
    escapes of GFF3 resolved; values that stand under one key several times are joined by commas.
    """

    region: Region
    source: str
    type: str
    score: float | None
    phase: int | None
    stranded: bool
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass
class FoundFeatures:
    """The features of a file in its order, and what was left out of it."""

    features: list[Feature]
    left_out: list[LeftOut] = field(default_factory=list)


def read_bed(
    path: str | os.PathLike[str], genome: Genome | None = None, *, skip_bad: bool = False
) -> FoundRegions:
    """The intervals of the BED file `path` (3 to 12 columns; plain, gzip or bgzip), in order.

    Columns: contig, start, end (0-based, half-open), name, score, strand; a strand of "." or none reads as
    "+". Cells are split at tabs, or at any white space in a line without one. Comments, "track" and "browser"
    lines and empty ones are passed over.

    genome: contigs must be among its records, and intervals must end within them.

    Raises FileNotFoundError, and GenomeError naming the line (from 1) for too few columns, a start or end
    that is no number, an interval that is empty or reversed, an unknown strand or contig, or an end past the
    record's end, and for a file without an interval.
    """
    file = expand_path(path)
    found = FoundRegions([])
    for number, line in _lines(file, found.left_out if skip_bad else None):
        if line.split(maxsplit=1)[0] in ("track", "browser"):
            continue
        try:
            found.regions.append(_interval(file, number, line, genome))
        except GenomeError as error:
            if not skip_bad:
                raise
            found.left_out.append(LeftOut(file, error.problem))
    if not found.regions and not found.left_out:
        raise GenomeError(file, "holds no interval, expected lines of contig, start and end")
    return found


def read_features(
    path: str | os.PathLike[str],
    types: Sequence[str] | None = None,
    genome: Genome | None = None,
    *,
    skip_bad: bool = False,
) -> FoundFeatures:
    """The features of the GFF3 or GTF file `path` (plain, gzip or bgzip), in order.

    types: those of the third column that are taken; None: all. genome: as for `read_bed`. What follows
    "##FASTA" is passed over. Which of the two formats the attributes have is seen line by line.

    Raises FileNotFoundError, and GenomeError naming the line (from 1) for anything but 9 columns, a start,
    end, score, phase, strand or attributes that are none, an end before its start, an unknown contig or an
    end past the record's end, and for a file without a feature.
    """
    if isinstance(types, str):
        raise TypeError(f"types is the string {types!r}, expected a list of types such as ['gene']")
    file = expand_path(path)
    found = FoundFeatures([])
    any_line = False
    for number, line in _lines(file, found.left_out if skip_bad else None):
        any_line = True
        try:
            cells = line.split("\t")
            if len(cells) != 9:
                raise _wrong(file, number, f"{len(cells)} columns separated by tabs, expected 9")
            if types is None or cells[2] in types:
                found.features.append(_feature(file, number, cells, genome))
        except GenomeError as error:
            if not skip_bad:
                raise
            found.left_out.append(LeftOut(file, error.problem))
    if not any_line and not found.left_out:
        raise GenomeError(file, "holds no feature, expected lines of 9 columns")
    return found


def read_intervals(
    path: str | os.PathLike[str], genome: Genome | None = None, *, skip_bad: bool = False
) -> FoundRegions:
    """The intervals of a GFF3 or GTF file, told by its ending (.gff, .gff3, .gtf, also with .gz or .bgz), or
    of a BED file; raises as `read_features` and `read_bed`."""
    file = expand_path(path)
    plain = Path(file.stem) if file.suffix in (".gz", ".bgz") else file
    if plain.suffix.lower() not in FEATURE_SUFFIXES:
        return read_bed(file, genome, skip_bad=skip_bad)
    found = read_features(file, None, genome, skip_bad=skip_bad)
    return FoundRegions([one.region for one in found.features], found.left_out)


def _lines(file: Path, left_out: list[LeftOut] | None) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines with content, up to "##FASTA"; a corrupt file is listed where asked for."""
    try:
        with open_text(file) as source:
            for number, line in enumerate(source, 1):
                if line.startswith("##FASTA"):
                    return
                if line.strip() and not line.startswith("#"):
                    yield number, line.rstrip("\r\n")
    except GenomeError as error:
        if left_out is None:
            raise
        left_out.append(LeftOut(file, error.problem))


def _interval(file: Path, number: int, line: str, genome: Genome | None) -> Region:
    cells = line.split("\t") if "\t" in line else line.split()
    if len(cells) < 3:
        raise _wrong(file, number, f"{len(cells)} columns, expected contig, start and end")
    start, end = (_whole(file, number, name, cells[i]) for name, i in (("start", 1), ("end", 2)))
    strand = _strand(file, number, cells[5] if len(cells) > 5 else ".", ".")
    name = cells[3] if len(cells) > 3 and cells[3] not in ("", ".") else None
    return _region(file, number, (cells[0], start, end, strand or "+", name), genome)


def _feature(file: Path, number: int, cells: list[str], genome: Genome | None) -> Feature:
    contig, source, kind, first, last, score, sign, phase, attributes = cells
    start, end = _whole(file, number, "start", first), _whole(file, number, "end", last)
    if start < 1 or end < start:
        raise _wrong(file, number, f"the feature from {start} to {end} (1-based) is none")
    if phase not in (".", "0", "1", "2"):
        raise _wrong(file, number, f"the phase is {phase!r}, expected 0, 1, 2 or '.'")
    try:
        value = None if score == "." else float(score)
    except ValueError:
        raise _wrong(file, number, f"the score is {score!r}, expected a number or '.'") from None
    strand = _strand(file, number, sign, ".?")
    notes = _attributes(file, number, attributes)
    name = notes.get("Name") or notes.get("ID") or notes.get("gene_name") or notes.get("gene_id")
    region = _region(file, number, (unquote(contig), start - 1, end, strand or "+", name), genome)
    return Feature(
        region, source, kind, value, None if phase == "." else int(phase), strand is not None, notes
    )


def _attributes(file: Path, number: int, text: str) -> dict[str, str]:
    notes: dict[str, str] = {}
    if text.strip() in ("", "."):
        return notes
    pairs: list[tuple[str, str]] = []
    if _GFF3.match(text):
        for part in filter(None, (p.strip() for p in text.split(";"))):
            key, equals, value = part.partition("=")
            if not equals:
                raise _wrong(file, number, f"the attribute {part!r} has no value, expected key=value")
            pairs.append((unquote(key), unquote(value)))
    else:
        at = 0
        while text[at:].strip():
            match = _GTF.match(text, at)
            if match is None:
                raise _wrong(file, number, f'the attributes {text[at:]!r} are none, expected key "value";')
            pairs.append((match["key"], match["quoted"] if match["plain"] is None else match["plain"]))
            at = match.end()
    for key, value in pairs:
        notes[key] = f"{notes[key]},{value}" if key in notes else value
    return notes


def _region(file: Path, number: int, given: tuple[Any, ...], genome: Genome | None) -> Region:
    try:
        region = Region(*given)
        if genome is not None:
            genome.check(region)
    except GenomeError as error:
        raise _wrong(file, number, error.problem) from None
    except ValueError as error:
        raise _wrong(file, number, str(error)) from None
    return region


def _strand(file: Path, number: int, sign: str, none: str) -> Strand | None:
    if sign == "+" or sign == "-":
        return "+" if sign == "+" else "-"
    if sign in none and sign:
        return None
    raise _wrong(file, number, f"the strand is {sign!r}, expected '+', '-' or '.'")


def _whole(file: Path, number: int, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _wrong(file, number, f"the {name} is {text!r}, expected a whole number")
    return int(text)


def _wrong(file: Path, number: int, problem: str) -> GenomeError:
    return GenomeError(file, f"line {number}: {problem}")

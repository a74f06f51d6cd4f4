"""Labelled sequences in CSV files `sequence,label`, as GUE has them (DNABERT-2, arXiv 2306.15006), and
sequences to be classified."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from ssm_modal.errors import nearest
from ssm_modal.io.genome import GENOME_SUFFIXES, iter_records
from ssm_modal.io.nucleotides import GenomeError, LetterError, fold_letters, open_text
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path

COLUMNS = ("sequence", "label")


@dataclass(frozen=True)
class LabelledSequence:
    """A sequence in upper-case letters, its class ("" where it is not known), and the line of the file it
    ends in, from 1, or the name of its record."""

    sequence: str
    label: str
    line: int = 0
    record: str = ""

    @property
    def place(self) -> str:
        """Where it stands in its file, for errors."""
        return f"record {self.record!r}" if self.record else f"line {self.line}"


@dataclass
class FoundSequences:
    """The sequences of a file in its order, and what was left out of it."""

    sequences: list[LabelledSequence]
    left_out: list[LeftOut] = field(default_factory=list)


def read_labelled_sequences(
    path: str | os.PathLike[str], *, labelled: bool = True, skip_bad: bool = False
) -> FoundSequences:
    """The sequences in the CSV file `path` (plain or gzip, UTF-8), with a header of `sequence` and `label`.

    labelled: False: the column `label` may be missing, and its cells empty. skip_bad: lines with a fault are
    left out and listed. Faults of the header are errors in any case.

    Raises FileNotFoundError, and GenomeError naming the line for a column that is unknown, lacking or twice
    there, a line with too many or too few cells, an empty sequence or label, a letter that is no nucleotide,
    and for a file without a sequence.
    """
    file = expand_path(path)
    found = FoundSequences([])
    with open_text(file) as source:
        lines = csv.reader(source, strict=True)
        try:
            columns = [cell.strip().lstrip("\ufeff") for cell in next(lines, [])]
            for column in columns:
                if column not in COLUMNS:
                    raise GenomeError(file, f"line 1: unknown column {column!r}; {nearest(column, COLUMNS)}")
            if sorted(columns) != sorted(COLUMNS) and (labelled or columns != ["sequence"]):
                wanted = " and ".join(COLUMNS) if labelled else "sequence, with or without label"
                raise GenomeError(file, f"line 1: the columns are {columns}, expected {wanted}")
            for cells in lines:
                if not cells:
                    continue
                try:
                    found.sequences.append(_sequence(columns, cells, lines.line_num, labelled))
                except ValueError as error:
                    problem = f"line {lines.line_num}: {error}"
                    if not skip_bad:
                        raise GenomeError(file, problem) from None
                    found.left_out.append(LeftOut(file, problem))
        except csv.Error as error:
            raise GenomeError(file, f"line {lines.line_num}: is no CSV: {error}") from error
    if not found.sequences and not found.left_out:
        raise GenomeError(file, "line 2: there is none, expected at least one sequence below the header")
    return found


def read_unlabelled_sequences(path: str | os.PathLike[str], *, skip_bad: bool = False) -> FoundSequences:
    """The sequences of a FASTA or GenBank file, told by its ending, or of a CSV file, where labels may be
    missing.

    Raises as `iter_records` and `read_labelled_sequences`.
    """
    file = expand_path(path)
    if not file.name.lower().endswith(GENOME_SUFFIXES):
        return read_labelled_sequences(file, labelled=False, skip_bad=skip_bad)
    found = FoundSequences([])
    for record in iter_records(file, found.left_out if skip_bad else None):
        found.sequences.append(LabelledSequence(record.letters.decode(), "", record=record.name))
    return found


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, in the order of their numbers where all are whole numbers, else of their text."""
    names = set(labels)
    if all(name.isascii() and name.lstrip("-").isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _sequence(columns: list[str], cells: list[str], line: int, labelled: bool) -> LabelledSequence:
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells, expected {len(columns)} ({', '.join(columns)})")
    row = {column: cell.strip() for column, cell in zip(columns, cells)}
    for name in COLUMNS if labelled else ("sequence",):
        if not row[name]:
            raise ValueError(f"the {name} is empty")
    try:
        return LabelledSequence(fold_letters(row["sequence"]).decode(), row.get("label", ""), line)
    except LetterError as error:
        raise ValueError(f"sequence: {error}") from None

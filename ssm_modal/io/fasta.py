"""Sequences from FASTA files, plain, gzip or bgzip: Biopython parses, faults are named by record and line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ssm_modal.io.nucleotides import GenomeError, LetterError, fold_letters, open_text
from ssm_modal.io.recordings import LeftOut


@dataclass(frozen=True)
class NucleotideRecord:
    """One record of a file. name: the header's first word. description: the rest of the header.

    letters: upper-case ASCII, see `ssm_modal.io.nucleotides`.
    """

    name: str
    description: str
    letters: bytes = field(repr=False)


@dataclass
class FoundRecords:
    """The records of a file, and what was left out of it."""

    records: list[NucleotideRecord]
    left_out: list[LeftOut] = field(default_factory=list)


def read_fasta(path: str | os.PathLike[str], *, skip_bad: bool = False) -> FoundRecords:
    """All records of the FASTA file `path`, in order; see `iter_fasta`."""
    found = FoundRecords([])
    found.records.extend(iter_fasta(path, found.left_out if skip_bad else None))
    return found


def iter_fasta(
    path: str | os.PathLike[str], left_out: list[LeftOut] | None = None
) -> Iterator[NucleotideRecord]:
    """The records of the FASTA file `path`, one in memory at a time.

    left_out: None raises at the first fault; a list takes bad records, each with the reason, and what is good
    goes on. A file that is no FASTA at all, or cut short, is listed as a whole, after the records before the
    fault.

    Raises FileNotFoundError, and GenomeError for an empty or corrupt file, text before the first header or no
    header, a header without a name, a name that is there twice, a record without a sequence and a letter that
    is no nucleotide, naming record and line.
    """
    file = Path(path)
    seen: dict[str, int] = {}
    try:
        for line, title, sequence in _parsed(file):
            try:
                yield _record(file, line, title, sequence, seen)
            except GenomeError as error:
                if left_out is None:
                    raise
                left_out.append(LeftOut(file, error.problem))
    except GenomeError as error:
        if left_out is None:
            raise
        left_out.append(LeftOut(file, error.problem))


def load_biopython() -> Any:
    """The package Bio; raises ImportError naming the command that mends it where it is missing."""
    try:
        import Bio
        import Bio.SeqIO
    except ImportError as error:
        raise ImportError("sequence files need biopython: pip install 'ssm-modal[genomics]'") from error
    return Bio


class _Lines:
    """The lines of an open file, counted; checks that the first with content is a header."""

    def __init__(self, file: Path, source: TextIO) -> None:
        self.file, self.source, self.count, self.first_header = file, source, 0, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.source:
            self.count += 1
            if not self.first_header and line.strip():
                if not line.startswith(">"):
                    raise GenomeError(
                        self.file,
                        f"line {self.count}: {line.strip()[:30]!r} is no header, expected '>' and a name",
                    )
                self.first_header = self.count
            if self.first_header:
                yield line
        if not self.first_header:
            raise GenomeError(self.file, "holds no record, expected '>' and a name, then a sequence")


def _parsed(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line of the header, header, sequence) of each record."""
    parse = load_biopython().SeqIO.FastaIO.SimpleFastaParser
    with open_text(file) as source:
        lines = _Lines(file, source)
        header = 0
        # The parser has read one line beyond a record when it gives it: the next one's header.
        for title, sequence in parse(lines):
            header = header or lines.first_header
            yield header, title, sequence
            header = lines.count


def _record(file: Path, line: int, title: str, sequence: str, seen: dict[str, int]) -> NucleotideRecord:
    name, _, description = title.strip().partition(" ")
    if not name:
        raise GenomeError(file, f"line {line}: the header has no name, expected '>' and a name")
    if name in seen:
        raise GenomeError(file, f"line {line}: the name {name!r} is there twice, first in line {seen[name]}")
    seen[name] = line
    if not sequence:
        raise GenomeError(file, f"record {name!r} (line {line}) has no sequence")
    try:
        return NucleotideRecord(name, description.strip(), fold_letters(sequence))
    except LetterError as error:
        at = _line_of(file, line, error.position)
        raise GenomeError(file, f"record {name!r}, line {at}: {error}") from None


def _line_of(file: Path, header: int, position: int) -> int:
    """The line that holds base `position` (from 0) of the record whose header is in line `header`."""
    with open_text(file) as source:
        for number, line in enumerate(source, 1):
            if number > header:
                position -= len(line.strip().replace(" ", ""))
                if position < 0:
                    return number
    return header

"""Sequences from GenBank flat files; Biopython parses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ssm_modal.io.fasta import FoundRecords, NucleotideRecord, load_biopython
from ssm_modal.io.nucleotides import GenomeError, LetterError, fold_letters, open_text
from ssm_modal.io.recordings import LeftOut


def read_genbank(path: str | os.PathLike[str], *, skip_bad: bool = False) -> FoundRecords:
    """All records of the GenBank file `path`, in order; see `iter_genbank`."""
    found = FoundRecords([])
    found.records.extend(iter_genbank(path, found.left_out if skip_bad else None))
    return found


def iter_genbank(
    path: str | os.PathLike[str], left_out: list[LeftOut] | None = None
) -> Iterator[NucleotideRecord]:
    """The records of the GenBank file `path` (plain, gzip or bgzip), one in memory at a time.

    A record's name is its accession with version. left_out: as for `iter_fasta`. Raises FileNotFoundError,
    and GenomeError for a file without a record, a name that is there twice, a record without a sequence, a
    letter that is no nucleotide and what Biopython cannot parse, naming the record (counted from 1).
    """
    file = Path(path)
    number = 0
    seen: set[str] = set()
    try:
        for number, record in enumerate(_parsed(file), 1):
            try:
                yield _record(file, number, record, seen)
            except GenomeError as error:
                if left_out is None:
                    raise
                left_out.append(LeftOut(file, error.problem))
        if number == 0:
            raise GenomeError(file, "holds no record, expected one that begins with LOCUS")
    except GenomeError as error:
        if left_out is None:
            raise
        left_out.append(LeftOut(file, error.problem))


def _parsed(file: Path) -> Iterator[object]:
    bio = load_biopython()
    number = 0
    with open_text(file) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore", bio.BiopythonParserWarning)
        try:
            for record in bio.SeqIO.parse(source, "genbank"):
                number += 1
                yield record
        except (ValueError, AssertionError) as error:
            if isinstance(error, GenomeError | UnicodeDecodeError):
                raise
            raise GenomeError(file, f"record {number + 1} is no GenBank record ({error})") from error


def _record(file: Path, number: int, record: object, seen: set[str]) -> NucleotideRecord:
    undefined = load_biopython().Seq.UndefinedSequenceError
    name = str(getattr(record, "id", ""))
    where = f"record {number} ({name!r})"
    if name in seen:
        raise GenomeError(file, f"{where}: the name is there twice")
    seen.add(name)
    try:
        letters = fold_letters(str(record.seq))  # type: ignore[attr-defined]
    except undefined:
        letters = b""
    except LetterError as error:
        raise GenomeError(file, f"{where}: {error}") from None
    if not letters:
        raise GenomeError(file, f"{where} has no sequence")
    return NucleotideRecord(name, str(getattr(record, "description", "")), letters)

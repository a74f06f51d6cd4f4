"""Genomes on the disk: parsed once, then mapped into memory, so that a window costs no parsing.

A genome is a folder, named by a hash of the files' content:

    bases.bin    uint8, upper-case letters (`ssm_modal.io.nucleotides`), the records of all files end to end
    meta.json    of each record: its file's number, name, description, first byte, length; and what was left
    out

It is built beside its place and renamed, so a reader finds it whole or not at all. Processes that map the
same folder share its memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.errors import closest
from ssm_modal.io.fasta import NucleotideRecord, iter_fasta
from ssm_modal.io.genbank import iter_genbank
from ssm_modal.io.ids import load_ids
from ssm_modal.io.nucleotides import GenomeError, N, open_text, reverse_complement
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.regions import Region, Strand, parse_region

FORMAT = 1
GENOME_SUFFIXES = tuple(
    ending + packed
    for ending in (".fa", ".fasta", ".fna", ".gb", ".gbk", ".gbff")
    for packed in ("", ".gz", ".bgz")
)
_MITOCHONDRIAL = ("M", "MT", "chrM", "chrMT")


@dataclass(frozen=True)
class GenomeRecord:
    """One sequence: `file` is the number of its file, `start` its first byte in the mapped array."""

    file: int
    name: str
    description: str
    start: int
    length: int


@dataclass(frozen=True)
class Genome:
    """The records of some files. Cheap to send to another process, which maps the bases itself.

    Coordinates are 0-based and half-open. files: as given. records: in the order of the files and in each
    file's order. left_out: with `skip_bad`, bad records and files, each with the reason.
    """

    folder: Path
    files: tuple[Path, ...]
    records: tuple[GenomeRecord, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def bases(self) -> Tensor:
        """All letters, uint8 (total,), mapped: only what is read takes memory."""
        return load_ids(self.folder / "bases.bin", torch.uint8)

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for number, record in enumerate(self.records):
            places.setdefault(record.name, []).append(number)
        return places

    def find(self, name: str, file: int | None = None) -> int:
        """The number of the record `name`, of file number `file` where several files have one.

        Where no record has the name, "1" also means "chr1" and the reverse; "MT", "M", "chrM" and "chrMT" are
        one. Raises GenomeError for an unknown name and for one that several files have.
        """
        for known in _aliases(name):
            found = [i for i in self._places.get(known, []) if file is None or self.records[i].file == file]
            if len(found) > 1:
                held = ", ".join(str(self.files[self.records[i].file]) for i in found)
                raise GenomeError(
                    self._path(file), f"the record {name!r} is in several files ({held}): say which"
                )
            if found:
                return found[0]
        near = closest(name, self._places)
        shown = ", ".join(list(self._places)[:5]) + (", ..." if len(self._places) > 5 else "")
        raise GenomeError(
            self._path(file),
            f"there is no record {name!r}"
            + (f", did you mean {near!r}?" if near is not None else "")
            + f" The records: {shown}",
        )

    def read(
        self,
        record: int | str,
        start: int = 0,
        end: int | None = None,
        strand: Strand = "+",
        *,
        pad: bool = False,
    ) -> Tensor:
        """Bases `start` to `end` (0-based, half-open; None: the record's end) of a record, by number or name.

        Returns upper-case letters, uint8 (end - start,), a copy. strand "-": their reverse complement. pad:
        what lies before the record or behind its end is N; otherwise that is an error.

        Raises GenomeError naming file and record for a place that the record does not have, ValueError for a
        strand other than "+" and "-".
        """
        if strand not in ("+", "-"):
            raise ValueError(f'strand is {strand!r}, expected "+" or "-"')
        entry = self.records[self.find(record) if isinstance(record, str) else record]
        stop = entry.length if end is None else end
        self._check(entry, start, stop, pad)
        first, last = min(max(start, 0), entry.length), min(max(stop, 0), entry.length)
        inside = self.bases[entry.start + first : entry.start + last]
        if last - first == stop - start:
            letters = inside.clone()
        else:
            letters = torch.full((stop - start,), N, dtype=torch.uint8)
            letters[first - start : first - start + inside.shape[0]] = inside
        return reverse_complement(letters) if strand == "-" else letters

    def fetch(self, region: Region | str, *, pad: bool = False) -> Tensor:
        """The letters of `region`, uint8 (n,), on its strand; a string as `parse_region` reads it."""
        place = parse_region(region) if isinstance(region, str) else region
        return self.read(self.find(place.contig), place.start, place.end, place.strand, pad=pad)

    def check(self, region: Region) -> None:
        """Raise GenomeError where `region` names an unknown record or goes past its end."""
        entry = self.records[self.find(region.contig)]
        self._check(entry, region.start, entry.length if region.end is None else region.end, False)

    def longest(self) -> int:
        """Bases of the longest record."""
        return max(record.length for record in self.records)

    def _check(self, entry: GenomeRecord, start: int, stop: int, pad: bool) -> None:
        where = f"record {entry.name!r}: bases {start} to {stop} (0-based)"
        if stop <= start:
            raise GenomeError(self.files[entry.file], f"{where} are none, expected an end behind the start")
        if not pad and (start < 0 or stop > entry.length):
            too_long = stop - start > self.longest()
            raise GenomeError(
                self.files[entry.file],
                f"{where} go past its {entry.length} bases"
                + (f"; {stop - start} bases are more than any record has" if too_long else ""),
            )

    def _path(self, file: int | None) -> Path:
        if file is not None or len(self.files) == 1:
            return self.files[file or 0]
        return Path(os.path.commonpath([f.absolute() for f in self.files]))


def open_genome(
    files: Sequence[str | os.PathLike[str]], cache_dir: str | os.PathLike[str], *, skip_bad: bool = False
) -> Genome:
    """The records of `files` (FASTA or GenBank, plain, gzip or bgzip), parsed into `cache_dir` or found
    there.

    A name may be there once in a file, and again in other files. skip_bad: bad records and files are left out
    and listed in `Genome.left_out`.

    Raises FileNotFoundError and GenomeError as `iter_fasta` and `iter_genbank`, GenomeError where no record
    is left, OSError where the disk is full; in each case nothing is left behind.
    """
    paths = tuple(Path(file) for file in files)
    if not paths:
        raise ValueError("files is empty, expected one or more FASTA or GenBank files")
    key = _key(paths, skip_bad)
    root = Path(cache_dir)
    target = root / key
    if not (target / "meta.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".tmp", dir=root))
        try:
            _build(work, paths, skip_bad)
            try:
                os.rename(work, target)
            except OSError:
                # Another process built the same genome meanwhile; its content is the same.
                if not (target / "meta.json").is_file():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    meta = json.loads((target / "meta.json").read_text(encoding="utf-8"))
    size = (target / "bases.bin").stat().st_size
    if size != meta["bases"]:
        raise ValueError(
            f"{target / 'bases.bin'} holds {size} bytes, expected {meta['bases']}; remove {target} "
            "and try again"
        )
    return Genome(
        target,
        paths,
        tuple(GenomeRecord(*row) for row in meta["records"]),
        tuple(LeftOut(paths[number], reason) for number, reason in meta["left_out"]),
    )


def iter_records(
    path: str | os.PathLike[str], left_out: list[LeftOut] | None = None
) -> Iterator[NucleotideRecord]:
    """The records of a FASTA or GenBank file, told apart by their first word; see `iter_fasta`."""
    file = Path(path)
    try:
        with open_text(file) as source:
            first = next((line for line in source if line.strip()), "")
    except GenomeError as error:
        if left_out is None:
            raise
        left_out.append(LeftOut(file, error.problem))
        return
    yield from iter_genbank(file, left_out) if first.startswith("LOCUS") else iter_fasta(file, left_out)


def _key(paths: Sequence[Path], skip_bad: bool) -> str:
    whole = hashlib.sha256(json.dumps([FORMAT, skip_bad]).encode())
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{str(path)!r}: there is no such file")
        with open(path, "rb") as source:
            whole.update(hashlib.file_digest(source, "sha256").digest())
    return whole.hexdigest()[:32]


def _build(work: Path, paths: Sequence[Path], skip_bad: bool) -> None:
    records: list[list[Any]] = []
    left_out: list[tuple[int, str]] = []
    total = 0
    with open(work / "bases.bin", "wb") as out:
        for number, path in enumerate(paths):
            bad: list[LeftOut] = []
            for record in iter_records(path, bad if skip_bad else None):
                out.write(record.letters)
                records.append([number, record.name, record.description, total, len(record.letters)])
                total += len(record.letters)
            left_out += [(number, one.reason) for one in bad]
        out.flush()
        os.fsync(out.fileno())
    if not records:
        raise GenomeError(
            paths[0], f"no record is left of {len(paths)} files; the first fault: {left_out[0][1]}"
        )
    meta = {"format": FORMAT, "bases": total, "records": records, "left_out": left_out}
    (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _aliases(name: str) -> list[str]:
    """The names that mean the same contig, `name` itself first."""
    if name in _MITOCHONDRIAL:
        return [name, *(other for other in _MITOCHONDRIAL if other != name)]
    return [name, name[3:] if name.startswith("chr") else f"chr{name}"]

"""Variants from VCF (pysam reads) and from TSV tables, checked against a genome.

A table has a header with the columns `chrom`, `pos` (1-based), `ref` and `alt` (or one of their other names,
see `COLUMNS`) among any others. Lines with a fault are errors that name file and line, or are left out and
listed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_modal.io.genome import Genome
from ssm_modal.io.nucleotides import GenomeError, LetterError, fold_letters, open_text, text_of
from ssm_modal.io.recordings import LeftOut

_WHOLE = re.compile(r"-?[0-9]+$")
COLUMNS = {
    "chrom": ("chrom", "#chrom", "contig", "chromosome", "chr"),
    "pos": ("pos", "position"),
    "ref": ("ref", "reference"),
    "alt": ("alt", "alternate"),
}
# The bases that a code of IUPAC in a genome stands for.
_MEANS = {
    **{base: base for base in "ACGT"},
    "R": "AG",
    "Y": "CT",
    "S": "CG",
    "W": "AT",
    "K": "GT",
    "M": "AC",
    "B": "CGT",
    "D": "AGT",
    "H": "ACT",
    "V": "ACG",
    "N": "ACGT",
}


@dataclass(frozen=True)
class Allele:
    """One alternative: bases `start` of its variant to `end` replaced by `letters`.

    letters: upper-case; None where there is no sequence to compare, for `reason`.
    """

    end: int
    letters: str | None
    reason: str = ""


@dataclass(frozen=True)
class Variant:
    """One line of a file. line: its number, from 1. record: the number of its record in the genome.

    start: 0-based. ref: the reference allele, upper-case. alleles: one for each alternative of the line, in
    order; none where it has "." alone.
    """

    line: int
    record: int
    start: int
    ref: str
    alleles: tuple[Allele, ...]


def is_vcf(path: str | os.PathLike[str]) -> bool:
    """Whether the file `path` is VCF, by its first line; False: it is to be read as a table.

    Raises FileNotFoundError, and GenomeError for an empty or corrupt file and for BCF.
    """
    file = Path(path)
    with open_text(file) as source:
        try:
            first = source.readline(4096)
        except GenomeError:
            with open(file, "rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
            if packed or str(file).endswith(".bcf"):
                raise GenomeError(file, "is no text; of BCF make VCF first: bcftools view") from None
            raise
    return first.startswith("##fileformat=VCF")


def iter_variants(
    path: str | os.PathLike[str], genome: Genome, left_out: list[LeftOut] | None = None
) -> Iterator[Variant]:
    """The variants of the VCF or TSV file `path` (plain, gzip or bgzip), in order.

    left_out: None raises at the first fault; a list takes bad lines, each with the reason.

    "*", "<DEL>" without an end, other symbolic alleles, breakends and alleles with letters other than A, C, G
    and T are kept as alleles without letters; "<DEL>" with END or SVLEN is the deletion that it says. "1"
    finds "chr1" and the reverse. Where the genome has a code of IUPAC, the reference allele must be one of
    its bases, or N.

    Raises FileNotFoundError, and GenomeError naming the line (from 1) for columns that are missing, a
    position that is no number or past the record's end, an unknown contig, a letter that is no nucleotide, a
    reference allele that is not the genome's, and for a file without a variant.
    """
    file = Path(path)
    lines = _vcf_lines(file) if is_vcf(file) else _table_lines(file)
    empty = True
    for number, fields in lines:
        empty = False
        try:
            if isinstance(fields, str):
                raise ValueError(fields)
            yield _variant(number, *fields, genome)
        except ValueError as error:
            problem = error.problem if isinstance(error, GenomeError) else str(error)
            if left_out is None:
                raise GenomeError(file, f"line {number}: {problem}") from None
            left_out.append(LeftOut(file, f"line {number}: {problem}"))
    if empty:
        raise GenomeError(file, "holds no variant, expected lines below the header")


def load_pysam() -> Any:
    """The package pysam; raises ImportError naming the command that mends it where it is missing."""
    try:
        import pysam
    except ImportError as error:
        raise ImportError("VCF and BAM files need pysam: pip install 'ssm-modal[genomics]'") from error
    return pysam


@contextmanager
def open_vcf(file: Path) -> Iterator[Any]:
    """`file` as a `pysam.VariantFile`, without htslib's messages; GenomeError where it is none."""
    pysam = load_pysam()
    quiet = pysam.set_verbosity(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = file
            if _gzip_only(file):
                # pysam reads no gzip but bgzip.
                plain = Path(folder) / "variants.vcf"
                with open_text(file) as packed, open(plain, "w", encoding="utf-8") as out:
                    shutil.copyfileobj(packed, out)
            try:
                source = pysam.VariantFile(str(plain))
            except (OSError, ValueError) as error:
                raise GenomeError(file, f"pysam cannot read it as VCF: {error}") from error
            with source:
                yield source
    finally:
        pysam.set_verbosity(quiet)


def _gzip_only(file: Path) -> bool:
    """Whether `file` is gzip, but not in the blocks of bgzip (SAM specification, section 4.1)."""
    with open(file, "rb") as source:
        head = source.read(14)
    return head[:2] == b"\x1f\x8b" and not (len(head) == 14 and head[3] & 4 and head[12:14] == b"BC")


def iter_vcf(file: Path, source: Any) -> Iterator[tuple[int, Any]]:
    """(line, record) of the records of `source`, an open `pysam.VariantFile` of `file`.

    The record is None where pysam cannot parse the line. pysam gives no line numbers, so the text is read
    beside it.
    """
    records = iter(source)
    with open_text(file) as text:
        for number, line in enumerate(text, 1):
            if line.startswith("#"):
                continue
            try:
                record = next(records)
            except StopIteration:
                return
            except OSError:
                record = None
            # htslib reads an empty line as a record; at the file's end it is nothing.
            if line.strip():
                yield number, record


def table_columns(file: Path, header: str) -> tuple[list[str], dict[str, int]]:
    """The cells of a table's header, and the place of chrom, pos, ref and alt among them.

    Raises GenomeError for one that is missing or there twice.
    """
    cells = header.rstrip("\r\n").split("\t")
    places: dict[str, int] = {}
    for name, names in COLUMNS.items():
        found = [i for i, cell in enumerate(cells) if cell.strip().lower() in names]
        if len(found) != 1:
            problem = "is missing" if not found else "is there twice"
            raise GenomeError(
                file,
                f"the column {name!r} {problem}; the header is {', '.join(cells)}, expected columns "
                f"separated by tabs: {', '.join(COLUMNS)}",
            )
        places[name] = found[0]
    return cells, places


# Of a line: contig, position, reference allele, alternatives, and where each ends if it is a deletion.
_Fields = tuple[str, str, str, list[str], list[int | None]]


def _vcf_lines(file: Path) -> Iterator[tuple[int, _Fields | str]]:
    """(line, its fields or what is wrong)."""
    with open_vcf(file) as source:
        for number, record in iter_vcf(file, source):
            if record is None:
                yield number, "pysam cannot parse it, expected the columns of VCF separated by tabs"
                continue
            alts = list(record.alts or ())
            yield number, (record.chrom, str(record.pos), record.ref or "", alts, _ends_of(record, alts))


def _ends_of(record: Any, alts: Sequence[str]) -> list[int | None]:
    """Where each alternative ends if it is a symbolic deletion, 0-based and half-open; None: not given.

    END is one for the line, SVLEN one an alternative: where there are several, SVLEN goes before END.
    """
    if "<DEL>" not in alts:
        return [None] * len(alts)
    # As text: pysam hides END, and what it gives as `stop` is of the longest allele of the line.
    info = dict(entry.partition("=")[::2] for entry in str(record).split("\t")[7].split(";"))
    lengths = info.get("SVLEN", "").split(",")
    if len(lengths) != len(alts):
        lengths = [""] * len(alts)
    by_length = [_end(record, record.pos + abs(int(n)) if _WHOLE.match(n) else 0) for n in lengths]
    end = _end(record, int(info["END"]) if _WHOLE.match(info.get("END", "")) else 0)
    return [one or end if len(alts) > 1 else end or one for one in by_length]


def _end(record: Any, end: int) -> int | None:
    """`end` if it lies behind the reference allele."""
    return end if end > record.start + len(record.ref or "") else None


def _table_lines(file: Path) -> Iterator[tuple[int, _Fields | str]]:
    width = 0
    places: dict[str, int] = {}
    with open_text(file) as source:
        for number, line in enumerate(source, 1):
            if line.startswith("##") or not line.strip():
                continue
            if not places:
                header, places = table_columns(file, line)
                width = len(header)
                continue
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != width:
                yield number, f"{len(cells)} columns separated by tabs, expected {width}"
                continue
            chrom, pos, ref, alt = (cells[places[name]].strip() for name in COLUMNS)
            alts = [] if alt in ("", ".") else alt.split(",")
            yield number, (chrom, pos, ref, alts, [None] * len(alts))


def _variant(
    line: int, contig: str, pos: str, ref: str, alts: list[str], ends: list[int | None], genome: Genome
) -> Variant:
    record = genome.find(contig)
    if not (pos.isascii() and pos.isdigit()) or int(pos) < 1:
        raise ValueError(f"the position is {pos!r}, expected a whole number of 1 or more")
    start = int(pos) - 1
    try:
        letters = fold_letters(ref).decode()
    except LetterError as error:
        raise ValueError(f"the reference allele {ref!r}: {error}") from None
    if not letters:
        raise ValueError("the reference allele is empty, expected one base or more")
    length = genome.records[record].length
    if start + len(letters) > length:
        raise ValueError(
            f"the position {pos} with {len(letters)} reference bases goes past the {length} bases of "
            f"{genome.records[record].name!r}"
        )
    have = text_of(genome.read(record, start, start + len(letters)))
    if not all(a in ("N", b) or a in _MEANS[b] for a, b in zip(letters, have)):
        raise ValueError(
            f"the reference allele is {letters!r}, but {genome.records[record].name!r} has {have!r} at "
            f"{pos}: is it another build of the genome?"
        )
    alleles = tuple(_allele(alt, start, letters, end, length) for alt, end in zip(alts, ends, strict=True))
    return Variant(line, record, start, letters, alleles)


def _allele(alt: str, start: int, ref: str, end: int | None, length: int) -> Allele:
    behind = start + len(ref)
    if alt == "*":
        return Allele(behind, None, "spanning deletion")
    if alt in (".", ""):
        return Allele(behind, None, "no alternative")
    if alt == "<DEL>":
        if end is None:
            return Allele(behind, None, "deletion without END or SVLEN")
        if end > length:
            raise ValueError(f"the deletion ends at {end}, past the record's {length} bases")
        return Allele(end, ref[:1]) if ref[0] in "ACGT" else Allele(end, None, "letter other than A C G T")
    if alt.startswith("<"):
        return Allele(behind, None, "symbolic allele")
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return Allele(behind, None, "breakend")
    try:
        letters = fold_letters(alt).decode()
    except LetterError as error:
        raise ValueError(f"the alternative allele {alt!r}: {error}") from None
    if set(letters) - set("ACGT") or set(ref) - set("ACGT"):
        return Allele(behind, None, "letter other than A C G T")
    return Allele(behind, letters)

"""A file of variants with a score beside each: valid VCF with INFO headers, or the table's own columns and
new ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ssm_modal.io.atomic import put_in_place, write_aside
from ssm_modal.io.nucleotides import GenomeError, open_text
from ssm_modal.io.variants import is_vcf, iter_vcf, load_pysam, open_vcf, table_columns

SCORE, NOTE = "SSM_DLL", "SSM_NOTE"
TABLE_COLUMNS = ("ssm_dll", "ssm_note")
# A score, or None and why there is none.
Scored = tuple[float | None, str]


def check_output(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise ValueError where `target` has not the ending of the kind of file that `source` is, and
    GenomeError where `source` has the scores' columns or fields already."""
    given, wanted = Path(source), Path(target)
    endings = (".vcf", ".vcf.gz", ".vcf.bgz") if is_vcf(given) else (".tsv", ".txt")
    if not wanted.name.endswith(endings):
        kind = "VCF" if is_vcf(given) else "a table"
        raise ValueError(
            f"the output is {str(wanted)!r}, but {given} is {kind}: expected a name that ends in "
            f"{' or '.join(endings)}"
        )
    if wanted.exists() and given.exists() and wanted.samefile(given):
        raise ValueError(f"the output is {str(wanted)!r}, the input itself, expected another file")
    if is_vcf(given):
        with open_vcf(given) as file:
            twice = [name for name in (SCORE, NOTE) if name in file.header.info]
    else:
        with open_text(given) as text:
            header = next((line for line in text if line.strip() and not line.startswith("##")), "")
        cells, _ = table_columns(given, header)
        twice = [name for name in TABLE_COLUMNS if name in cells]
    if twice:
        raise GenomeError(given, f"has {', '.join(twice)} already; give the file as it was before scoring")


def write_scored(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scores: Mapping[int, Sequence[Scored]],
    about: str,
) -> None:
    """Write the lines of `source` that `scores` has to `target`, with their scores, whole or not at all.

    scores: for each line (numbered from 1) one score an alternative. Lines that are not there are left out;
    they were bad. VCF: the fields `SSM_DLL` (Number=A, Float) and `SSM_NOTE` (Number=A, why there is no
    score) with their headers; a `target` that ends in .gz or .bgz is bgzip. Tables: the columns `ssm_dll` and
    `ssm_note` behind the file's own, "." where nothing is to be said, alternatives separated by commas.

    about: how the score is made, for the header.
    """
    given, wanted = Path(source), Path(target)
    write = _write_vcf if is_vcf(given) else _write_table
    packed = wanted.name.endswith((".gz", ".bgz"))
    put_in_place(write_aside(wanted, lambda aside: write(given, aside, scores, about, packed)), wanted)


def _write_vcf(
    given: Path, aside: Path, scores: Mapping[int, Sequence[Scored]], about: str, packed: bool
) -> None:
    with open_vcf(given) as first:
        # Reading adds what the header lacks (contigs, INFO, FORMAT), so that the output is valid.
        for _ in iter_vcf(given, first):
            pass
        header = first.header.copy()
    with open_vcf(given) as source, _text_file(aside, packed) as out:
        for one in (header, source.header):
            one.info.add(SCORE, "A", "Float", about.replace('"', "'"))
            one.info.add(NOTE, "A", "String", f"Why {SCORE} is missing")
        out(str(header))
        for number, record in iter_vcf(given, source):
            if record is None or number not in scores:
                continue
            found = scores[number]
            if found:
                record.info[SCORE] = tuple(value for value, _ in found)
                notes = [note.replace(" ", "_").replace(",", "") for _, note in found]
                if any(notes):
                    record.info[NOTE] = tuple(note or "." for note in notes)
            # As text: htslib ends the process where it is to write a record that lacked a definition.
            out(str(record))


@contextmanager
def _text_file(path: Path, packed: bool) -> Iterator[Callable[[str], object]]:
    """What writes text to `path`, plain or as bgzip."""
    if packed:
        with load_pysam().BGZFile(str(path), "wb") as file:
            yield lambda text: file.write(text.encode())
    else:
        with open(path, "w", encoding="utf-8", newline="\n") as plain:
            yield plain.write


def _write_table(
    given: Path, aside: Path, scores: Mapping[int, Sequence[Scored]], about: str, packed: bool
) -> None:
    header = False
    with open_text(given) as source, open(aside, "w", encoding="utf-8", newline="\n") as out:
        for number, line in enumerate(source, 1):
            plain = line.rstrip("\r\n")
            if line.startswith("##"):
                out.write(plain + "\n")
            elif not line.strip():
                continue
            elif not header:
                header = True
                out.write("\t".join([plain, *TABLE_COLUMNS]) + "\n")
            elif number in scores:
                found = scores[number]
                value = ",".join("." if v is None else f"{v:.6g}" for v, _ in found) or "."
                notes = ",".join(note.replace(",", "") or "." for _, note in found)
                out.write("\t".join([plain, value, notes if notes.strip(".,") else "."]) + "\n")

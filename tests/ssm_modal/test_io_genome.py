"""Genomes from FASTA and GenBank: letters, names, windows, the cache, and errors that say where."""

from __future__ import annotations

import gzip
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("Bio")

from ssm_modal.io import genome as genome_module
from ssm_modal.io.fasta import iter_fasta, read_fasta
from ssm_modal.io.genbank import read_genbank
from ssm_modal.io.genome import GENOME_SUFFIXES, Genome, open_genome
from ssm_modal.io.nucleotides import GenomeError, LetterError, letters_of, reverse_complement, text_of
from ssm_modal.io.regions import Region, parse_region
from ssm_modal.io.text import text_files

FASTA = ">chr1 first one\nACGTacgt\nNRYu\n\n>chr2\nGG CC\n>MT\nTTTTA\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def opened(tmp_path: Path, text: str = FASTA, **options: Any) -> Genome:
    return open_genome([write(tmp_path / "g.fa", text)], tmp_path / "cache", **options)


def test_letters_are_folded_and_the_other_strand_is_exact() -> None:
    assert text_of(letters_of("acguRYSWKMBDHVN")) == "ACGTRYSWKMBDHVN"
    assert text_of(reverse_complement(letters_of("AACGTRYSWKMBDHVN"))) == "NBDHVKMWSRYACGTT"
    every = letters_of("ACGTRYSWKMBDHVN")
    assert torch.equal(reverse_complement(reverse_complement(every)), every)
    assert letters_of("").shape == (0,)
    assert text_of(letters_of("")) == ""
    for text, letter, position in (("ACG-T", "-", 3), ("AéC", "é", 1), ("E", "E", 0), ("AC*", "*", 2)):
        with pytest.raises(LetterError, match=f"base {position + 1} is no nucleotide") as caught:
            letters_of(text)
        assert (caught.value.letter, caught.value.position) == (letter, position)


def test_records_are_what_biopython_reads(tmp_path: Path) -> None:
    found = read_fasta(write(tmp_path / "a.fa", "\n" + FASTA.replace("\n", "\r\n")))
    assert [(r.name, r.description, r.letters) for r in found.records] == [
        ("chr1", "first one", b"ACGTACGTNRYT"),
        ("chr2", "", b"GGCC"),
        ("MT", "", b"TTTTA"),
    ]
    packed = tmp_path / "a.fa.gz"
    packed.write_bytes(gzip.compress(FASTA.encode()))
    assert read_fasta(packed).records == found.records


def test_bgzip_is_read_block_by_block(tmp_path: Path) -> None:
    bgzf = pytest.importorskip("Bio.bgzf")
    with bgzf.BgzfWriter(str(tmp_path / "b.fa.bgz")) as out:
        out.write(FASTA)
        out.flush()
        out.write(">more\nACGT\n")
    records = read_fasta(tmp_path / "b.fa.bgz").records
    assert [r.name for r in records] == ["chr1", "chr2", "MT", "more"]
    assert records[3].letters == b"ACGT"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"the file is empty \(0 bytes\)"),
        ("\n\n", "holds no record"),
        ("ACGT\n", "line 1: 'ACGT' is no header"),
        ("\n; old\n>a\nA\n", "line 2: '; old' is no header"),
        (">a\nACGT\n>\nAC\n", "line 3: the header has no name"),
        (">a\nAC\n>b\n>c\nA\n", r"record 'b' \(line 3\) has no sequence"),
        (">a\nAC\n>b x\nA\n>a\nG\n", "line 5: the name 'a' is there twice, first in line 1"),
        (">a\nAC\n>b\nACGT\n\nAC GXT\n", r"record 'b', line 6: letter 'X' at base 8 is no nucleotide"),
    ],
)
def test_errors_of_fasta_name_record_and_line(tmp_path: Path, text: str, problem: str) -> None:
    file = write(tmp_path / "bad.fa", text)
    with pytest.raises(GenomeError, match=problem) as caught:
        read_fasta(file)
    assert caught.value.path == file
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    found = read_fasta(file, skip_bad=True)
    assert [one.path for one in found.left_out] == [file]
    assert found.left_out[0].reason == caught.value.problem
    assert all(r.name and r.letters for r in found.records)
    with pytest.raises(FileNotFoundError, match=r"none\.fa"):
        read_fasta(tmp_path / "none.fa")


def test_skip_bad_goes_on_behind_a_bad_record_and_keeps_what_was_before_a_cut(tmp_path: Path) -> None:
    left: list[Any] = []
    text = ">a\nACGT\n>b\nA-C\n>c\n\n>a\nGG\n>d\nTT\n"
    assert [r.name for r in iter_fasta(write(tmp_path / "a.fa", text), left)] == ["a", "d"]
    assert [one.reason.split(":")[0] for one in left] == [
        "record 'b', line 4",
        "record 'c' (line 5) has no sequence",
        "line 7",
    ]
    cut = tmp_path / "cut.fa.gz"
    draw = random.Random(0)
    lines = [f">r{i}\n{''.join(draw.choices('ACGT', k=400))}\n" for i in range(200)]
    packed = gzip.compress("".join(lines).encode())
    cut.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(GenomeError, match="cut short or corrupt"):
        read_fasta(cut)
    found = read_fasta(cut, skip_bad=True)
    assert len(found.left_out) == 1
    assert 0 < len(found.records) < 200


GENBANK = """LOCUS       X1                        12 bp    DNA     linear   BCT 01-JAN-2000
DEFINITION  Some sequence.
ACCESSION   X1
VERSION     X1.2
ORIGIN
        1 acgtacgtnn rt
//
LOCUS       X2                         4 bp    DNA     linear   BCT 01-JAN-2000
DEFINITION  Another.
ACCESSION   X2
VERSION     X2.1
{origin}//
"""


def test_genbank_records(tmp_path: Path) -> None:
    good = write(tmp_path / "a.gb", GENBANK.format(origin="ORIGIN\n        1 ttga\n"))
    found = read_genbank(good)
    assert [(r.name, r.letters) for r in found.records] == [("X1.2", b"ACGTACGTNNRT"), ("X2.1", b"TTGA")]
    assert found.records[0].description == "Some sequence"
    genome = open_genome([good, write(tmp_path / "b.fa", FASTA)], tmp_path / "cache")
    assert [r.name for r in genome.records] == ["X1.2", "X2.1", "chr1", "chr2", "MT"]
    assert text_of(genome.fetch("X2.1:2-4(-)")) == "TCA"
    bad = write(tmp_path / "c.gb", GENBANK.format(origin="CONTIG      join(A.1:1..4)\n"))
    with pytest.raises(GenomeError, match=r"record 2 \('X2.1'\) has no sequence"):
        read_genbank(bad)
    assert [r.name for r in read_genbank(bad, skip_bad=True).records] == ["X1.2"]
    with pytest.raises(GenomeError, match="holds no record, expected one that begins with LOCUS"):
        read_genbank(write(tmp_path / "d.gb", "nothing\n"))
    twice = good.read_text().replace("X2.1", "X1.2").replace("X2", "X1")
    with pytest.raises(GenomeError, match=r"record 2 .*the name is there twice"):
        read_genbank(write(tmp_path / "e.gb", twice))


def test_windows_strands_and_ends(tmp_path: Path) -> None:
    genome = opened(tmp_path)
    assert [(r.name, r.start, r.length) for r in genome.records] == [
        ("chr1", 0, 12),
        ("chr2", 12, 4),
        ("MT", 16, 5),
    ]
    assert genome.bases.dtype == torch.uint8
    assert text_of(genome.bases) == "ACGTACGTNRYTGGCCTTTTA"
    assert text_of(genome.read("chr1", 7, 12)) == "TNRYT"
    assert text_of(genome.read("chr1", 7, 12, "-")) == "ARYNA"
    assert text_of(genome.read(1)) == "GGCC"
    assert text_of(genome.read(1, 2, 7, pad=True)) == "CCNNN"
    assert text_of(genome.read(1, -2, 3, pad=True)) == "NNGGC"
    assert text_of(genome.read(1, -1, 6, "-", pad=True)) == "NNGGCCN"
    assert text_of(genome.read(1, 9, 11, pad=True)) == "NN"
    assert text_of(genome.read(1, -4, -1, pad=True)) == "NNN"
    for start, end in ((2, 5), (-1, 2), (4, 6)):
        with pytest.raises(
            GenomeError, match=rf"g\.fa: record 'chr2': bases {start} to {end} .* past its 4 bases"
        ):
            genome.read("chr2", start, end)
    with pytest.raises(GenomeError, match="13 bases are more than any record has"):
        genome.read("chr1", 0, 13)
    for start, end in ((2, 2), (3, 1)):
        with pytest.raises(GenomeError, match="are none"):
            genome.read("chr2", start, end, pad=True)
    with pytest.raises(ValueError, match=r"strand is '\.'"):
        genome.read("chr2", strand=".")  # type: ignore[arg-type]
    # A copy: writing to it leaves the genome.
    genome.read("chr2")[:] = 0
    assert text_of(genome.read("chr2")) == "GGCC"


def test_names_and_their_aliases(tmp_path: Path) -> None:
    genome = opened(tmp_path, FASTA + ">3\nACG\n")
    assert [genome.find(n) for n in ("chr1", "1", "2", "chrM", "M", "3", "chr3")] == [0, 0, 1, 2, 2, 3, 3]
    with pytest.raises(GenomeError, match=r"g\.fa: there is no record 'chr9', did you mean"):
        genome.find("chr9")
    both = open_genome([tmp_path / "g.fa", write(tmp_path / "h.fa", ">1\nTTT\n")], tmp_path / "cache")
    assert text_of(both.read(both.find("1"))) == "TTT"
    assert text_of(both.read(both.find("1", file=0), 0, 3)) == "ACG"
    third = open_genome([*both.files, write(tmp_path / "i.fa", ">1\nGGG\n")], tmp_path / "cache")
    with pytest.raises(GenomeError, match=r"'1' is in several files \(.*h\.fa, .*i\.fa\): say which"):
        third.find("1")
    assert text_of(third.read(third.find("1", file=2))) == "GGG"


def test_regions_are_one_based_in_text_and_zero_based_inside(tmp_path: Path) -> None:
    assert parse_region("chr1:1,000-2,000") == Region("chr1", 999, 2000)
    assert parse_region("chr1") == Region("chr1", 0, None)
    assert parse_region("chr1:7") == parse_region("chr1:7-") == Region("chr1", 6, None)
    assert parse_region("HLA:A:1-1(-)") == Region("HLA:A", 0, 1, "-")
    assert parse_region("HLA:A*01") == Region("HLA:A*01")
    for region in (Region("a", 4, 9, "-"), Region("a"), Region("a", 3, None)):
        assert parse_region(str(region)) == region
    for text, problem in (
        ("chr1:0-5", "starts at 0"),
        ("chr1:5-4", "ends before it starts"),
        ("", "expected a contig's name"),
        ("chr1:,-5", "is no number"),
    ):
        with pytest.raises(ValueError, match=problem):
            parse_region(text)
    with pytest.raises(ValueError, match="reversed"):
        Region("a", 5, 3)
    with pytest.raises(ValueError, match="empty"):
        Region("a", 3, 3)
    genome = opened(tmp_path)
    assert text_of(genome.fetch("1:1-4")) == "ACGT"
    assert text_of(genome.fetch("chr1:9-")) == "NRYT"
    assert text_of(genome.fetch(Region("chr2", 1, 4, "-"))) == "GGC"
    assert text_of(genome.fetch("chr2:4-6", pad=True)) == "CNN"
    with pytest.raises(GenomeError, match=r"bases 3 to 6 \(0-based\) go past its 4"):
        genome.fetch("chr2:4-6")


def test_a_genome_is_parsed_once_and_left_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(tmp_path)
    _ = first.bases
    assert "bases" not in pickle.loads(pickle.dumps(first)).__dict__
    assert text_of(pickle.loads(pickle.dumps(first)).read("chr2")) == "GGCC"

    def fail(*_: object) -> None:
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(genome_module, "iter_records", fail)
        assert opened(tmp_path) == first
        with pytest.raises(OSError, match="no space"):
            open_genome([write(tmp_path / "n.fa", ">x\nA\n")], tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [first.folder.name]
    assert opened(tmp_path, FASTA + "A").folder != first.folder
    (first.folder / "bases.bin").write_bytes(b"ACG")
    with pytest.raises(ValueError, match="holds 3 bytes, expected 21"):
        opened(tmp_path)


def test_bad_records_and_files_are_left_out_of_a_genome(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.fa", ">a\nACGT\n>b\n>c\nGGG\n"),
        write(tmp_path / "b.fa", ""),
        write(tmp_path / "c.fa", ">a\nTT\n"),
    ]
    with pytest.raises(GenomeError, match=r"a\.fa: record 'b' \(line 3\) has no sequence"):
        open_genome(files, tmp_path / "cache")
    genome = open_genome(files, tmp_path / "cache", skip_bad=True)
    assert [(r.file, r.name, r.start, r.length) for r in genome.records] == [
        (0, "a", 0, 4),
        (0, "c", 4, 3),
        (2, "a", 7, 2),
    ]
    assert [(one.path, one.reason) for one in genome.left_out] == [
        (files[0], "record 'b' (line 3) has no sequence"),
        (files[1], "the file is empty (0 bytes)"),
    ]
    with pytest.raises(GenomeError, match="no record is left of 1 files; the first fault: the file is empty"):
        open_genome(files[1:2], tmp_path / "cache", skip_bad=True)


@pytest.mark.skipif("SSM_MODAL_DATA" not in os.environ, reason="needs real data: SSM_MODAL_DATA is not set")
def test_bacteria15(tmp_path: Path) -> None:
    folder = Path(os.environ["SSM_MODAL_DATA"]) / "genomics/bacteria15"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    genome = open_genome(text_files(folder, GENOME_SUFFIXES), tmp_path)
    assert (len(genome.files), len(genome.records), genome.bases.shape[0]) == (15, 89, 54_142_446)
    counts = torch.bincount(genome.bases[: 1 << 20].to(torch.int64), minlength=256)
    assert int(counts[list(b"ACGT")].sum()) == 1 << 20

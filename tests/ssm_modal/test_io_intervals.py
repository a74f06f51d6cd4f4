"""BED, GFF3, GTF and labelled sequences: coordinates, strands, and errors that name the line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

pytest.importorskip("Bio")

from ssm_modal.io.genome import Genome, open_genome
from ssm_modal.io.intervals import read_bed, read_features
from ssm_modal.io.labelled_sequences import class_names, read_labelled_sequences
from ssm_modal.io.nucleotides import GenomeError, text_of
from ssm_modal.io.regions import Region


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    return open_genome([write(tmp_path / "g.fa", ">chr1\nAACCGGTTRN\n>2\nACGT\n")], tmp_path / "cache")


def test_bed_is_zero_based_and_has_strands(tmp_path: Path, genome: Genome) -> None:
    text = (
        "# note\ntrack name=x\nbrowser position chr1\n\nchr1\t0\t4\n"
        "1\t2\t9\tgene one\t0\t-\nchr2 1 4 . 0 .\nchr1\t9\t10\tn\t5\t+\t9\t9\n"
    )
    found = read_bed(write(tmp_path / "a.bed", text), genome)
    assert found.regions == [
        Region("chr1", 0, 4),
        Region("1", 2, 9, "-", "gene one"),
        Region("chr2", 1, 4),
        Region("chr1", 9, 10, "+", "n"),
    ]
    assert [text_of(genome.fetch(r)) for r in found.regions] == ["AACC", "YAACCGG", "CGT", "N"]
    packed = tmp_path / "a.bed.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_bed(packed).regions == found.regions


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("chr1\t5", "2 columns, expected contig, start and end"),
        ("chr1\t5\tx", "the end is 'x', expected a whole number"),
        ("chr1\t-1\t3", "the start is '-1'"),
        ("chr1\t5\t5", r"from 5 to 5 of 'chr1' \(0-based\) is empty"),
        ("chr1\t5\t4", "is reversed"),
        ("chr1\t5\t11", r"record 'chr1': bases 5 to 11 \(0-based\) go past its 10 bases"),
        ("chrX\t5\t6", "there is no record 'chrX'"),
        ("chr1\t1\t2\ta\t0\t*", r"the strand is '\*'"),
    ],
)
def test_errors_of_bed_name_the_line(tmp_path: Path, genome: Genome, line: str, problem: str) -> None:
    file = write(tmp_path / "a.bed", f"chr1\t0\t1\n{line}\n2\t0\t1\n")
    with pytest.raises(GenomeError, match=rf"a\.bed: line 2: .*{problem}"):
        read_bed(file, genome)
    found = read_bed(file, genome, skip_bad=True)
    assert found.regions == [Region("chr1", 0, 1), Region("2", 0, 1)]
    assert [(one.path, one.reason[:7]) for one in found.left_out] == [(file, "line 2:")]
    with pytest.raises(GenomeError, match="holds no interval"):
        read_bed(write(tmp_path / "b.bed", "# nothing\n"))


GFF3 = (
    "##gff-version 3\n"
    "chr1\tsrc\tgene\t3\t6\t.\t-\t.\tID=g1;Name=my%3Bgene;Dbxref=a,b\n"
    "chr1\tsrc\tCDS\t3\t5\t1.5\t+\t2\tParent=g1;\n"
    "2\tsrc\tregion\t1\t4\t.\t.\t.\t.\n"
    "##FASTA\n>chr1\nACGT\n"
)
GTF = (
    '#!genome\nchr1\tsrc\texon\t1\t2\t.\t-\t.\tgene_id "g 1; x"; exon_number 2; tag "a"; tag "b";\n'
    '2\tsrc\tgene\t4\t4\t.\t+\t.\tgene_id "g2"; gene_name "abc"\n'
)


def test_features_are_one_based_in_the_file_and_zero_based_inside(tmp_path: Path, genome: Genome) -> None:
    first, second, third = read_features(write(tmp_path / "a.gff3", GFF3), genome=genome).features
    assert first.region == Region("chr1", 2, 6, "-", "my;gene")
    assert text_of(genome.fetch(first.region)) == "CCGG"
    assert first.attributes == {"ID": "g1", "Name": "my;gene", "Dbxref": "a,b"}
    assert (first.type, first.source, first.score, first.phase, first.stranded) == (
        "gene",
        "src",
        None,
        None,
        True,
    )
    assert second.region == Region("chr1", 2, 5)
    assert (second.score, second.phase, second.attributes) == (1.5, 2, {"Parent": "g1"})
    assert (third.region, third.stranded, third.attributes) == (Region("2", 0, 4), False, {})
    assert [f.type for f in read_features(tmp_path / "a.gff3", ["CDS"]).features] == ["CDS"]
    exon, gene = read_features(write(tmp_path / "a.gtf", GTF), genome=genome).features
    assert exon.region == Region("chr1", 0, 2, "-", "g 1; x")
    assert exon.attributes == {"gene_id": "g 1; x", "exon_number": "2", "tag": "a,b"}
    assert gene.region == Region("2", 3, 4, "+", "abc")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("\t2\tParent", " 2 Parent", "7 columns|8 columns"),
        ("\t3\t5\t", "\t0\t5\t", "from 0 to 5 .* is none"),
        ("\t3\t5\t", "\t6\t5\t", "from 6 to 5 .* is none"),
        ("\t3\t5\t", "\t3\t11\t", "go past its 10 bases"),
        ("1.5", "high", "the score is 'high'"),
        ("\t+\t2", "\t+\t3", "the phase is '3'"),
        ("\t+\t2", "\tx\t2", "the strand is 'x'"),
        ("Parent=g1;", "Parent=g1;oops", "'oops' has no value"),
        ("Parent=g1;", "gene_id;", "attributes 'gene_id;' are none"),
    ],
)
def test_errors_of_features_name_the_line(
    tmp_path: Path, genome: Genome, old: str, new: str, problem: str
) -> None:
    assert old in GFF3
    file = write(tmp_path / "a.gff3", GFF3.replace(old, new))
    with pytest.raises(GenomeError, match=rf"a\.gff3: line 3: .*({problem})"):
        read_features(file, genome=genome)
    found = read_features(file, genome=genome, skip_bad=True)
    assert [f.type for f in found.features] == ["gene", "region"]
    assert len(found.left_out) == 1


def test_labelled_sequences(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "\ufefflabel,sequence\r\n1,acgu\r\n\r\n10,NNR\n2,A\n")
    found = read_labelled_sequences(file)
    assert [(s.sequence, s.label, s.line) for s in found.sequences] == [
        ("ACGT", "1", 2),
        ("NNR", "10", 4),
        ("A", "2", 5),
    ]
    assert class_names(s.label for s in found.sequences) == ("1", "2", "10")
    assert class_names(["b", "10", "2"]) == ("10", "2", "b")


@pytest.mark.parametrize(
    ("text", "problem", "header"),
    [
        ("sequence,lable\nA,1\n", "line 1: unknown column 'lable'; did you mean 'label'", True),
        ("sequence\nA\n", r"line 1: the columns are \['sequence'\]", True),
        ("sequence,sequence\nA,A\n", "line 1: the columns are", True),
        ("sequence,label\nA,0\nA,1,2\n", "line 3: 3 cells, expected 2", False),
        ("sequence,label\nA,0\n,1\n", "line 3: the sequence is empty", False),
        ("sequence,label\nA,0\nA,\n", "line 3: the label is empty", False),
        ("sequence,label\nA,0\nACXG,1\n", "line 3: sequence: letter 'X' at base 3", False),
        ("sequence,label\n", "line 2: there is none", True),
    ],
)
def test_errors_of_labelled_sequences(tmp_path: Path, text: str, problem: str, header: bool) -> None:
    file = write(tmp_path / "a.csv", text)
    with pytest.raises(GenomeError, match=rf"a\.csv: {problem}"):
        read_labelled_sequences(file)
    if header:
        with pytest.raises(GenomeError, match=problem):
            read_labelled_sequences(file, skip_bad=True)
    else:
        found = read_labelled_sequences(file, skip_bad=True)
        assert [s.label for s in found.sequences] == ["0"]
        assert found.left_out[0].reason.startswith("line 3: ")

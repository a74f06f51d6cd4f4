"""Variants in and out: what each allele means, what is refused with its line, and files that stay valid."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

pytest.importorskip("pysam")
pytest.importorskip("Bio")

import pysam

from ssm_modal.io.bedgraph import Track, write_bedgraph
from ssm_modal.io.coverage import coverage
from ssm_modal.io.genome import Genome, open_genome
from ssm_modal.io.journal import Journal
from ssm_modal.io.nucleotides import GenomeError
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.scored_variants import check_output, write_scored
from ssm_modal.io.variants import Allele, Variant, iter_variants

HEAD = (
    "##fileformat=VCFv4.2\n##contig=<ID=1>\n"
    '##INFO=<ID=END,Number=1,Type=Integer,Description="end">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tann\n"
)


def vcf(path: Path, *lines: str) -> Path:
    path.write_text(HEAD + "".join("\t".join(line.split()) + "\n" for line in lines))
    return path


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "g.fa").write_text(">chr1\nACGTacgtRNACGT\n>2\nGGGG\n")
    return open_genome([tmp_path / "g.fa"], tmp_path / "cache")


def test_alleles_of_a_vcf(tmp_path: Path, genome: Genome) -> None:
    file = vcf(
        tmp_path / "a.vcf",
        "1 2 rs1 c T,*,<INS> . PASS . GT 0/1",
        "1 3 . GTA G . . . GT 0/1",
        "chr2 1 . G GA . . . GT 0/1",
        "1 5 . A <DEL> . . END=7 GT 0/1",
        "1 5 . A <DEL> . . . GT 0/1",
        "1 6 . C . . . . GT 0/0",
        "1 9 . A G,N,]2:3]G . . . GT 0/1",
        "1 10 . N T . . . GT 0/1",
    )
    found = list(iter_variants(file, genome))
    gone, bad = "spanning deletion", "letter other than A C G T"
    assert found[0] == Variant(
        5, 0, 1, "C", (Allele(2, "T"), Allele(2, None, gone), Allele(2, None, "symbolic allele"))
    )
    assert found[1] == Variant(6, 0, 2, "GTA", (Allele(5, "G"),))
    assert found[2] == Variant(7, 1, 0, "G", (Allele(1, "GA"),))
    assert found[3] == Variant(8, 0, 4, "A", (Allele(7, "A"),))
    assert found[4].alleles == (Allele(5, None, "deletion without END or SVLEN"),)
    assert found[5].alleles == ()
    # The genome's R is A or G: the reference allele may be either.
    assert found[6].alleles == (Allele(9, "G"), Allele(9, None, bad), Allele(9, None, "breakend"))
    assert found[7] == Variant(12, 0, 9, "N", (Allele(10, None, bad),))


def test_each_deletion_of_a_line_has_its_own_length(tmp_path: Path, genome: Genome) -> None:
    file = vcf(
        tmp_path / "a.vcf",
        "1 5 . A <INS>,<DEL>,<DEL> . . SVLEN=50,-3,. GT 0/1",
        "1 5 . A <DEL>,<DEL> . . SVLEN=-3,.;END=7 GT 0/1",
        "1 5 . A <DEL> . . SVLEN=-3 GT 0/1",
        "1 5 . A <DEL>,T . . SVLEN=-3 GT 0/1",
        "1 5 . A T,<DEL> . . END=7 GT 0/1",
    )
    length = '##INFO=<ID=SVLEN,Number=.,Type=Integer,Description="length">\n'
    file.write_text(file.read_text().replace("#CHROM", length + "#CHROM"))
    alleles = [[(one.end, one.letters) for one in v.alleles] for v in iter_variants(file, genome)]
    assert alleles == [
        [(5, None), (8, "A"), (5, None)],
        [(8, "A"), (7, "A")],
        [(8, "A")],
        [(5, None), (5, "T")],
        [(5, "T"), (7, "A")],
    ]


BAD = [
    ("1 2 . A T . . . GT 0/1", r"line 5: the reference allele is 'A', but 'chr1' has 'C' at 2"),
    ("chr3 2 . A T . . . GT 0/1", r"line 5: there is no record 'chr3'"),
    ("1 14 . TA T . . . GT 0/1", r"line 5: the position 14 with 2 reference bases goes past the 14 bases"),
    ("1 2 . C T! . . . GT 0/1", r"line 5: the alternative allele 'T!': letter '!' at base 2"),
    ("1 9 . C T . . . GT 0/1", r"line 5: the reference allele is 'C', but 'chr1' has 'R'"),
    ("1 x . C T . . . GT 0/1", r"line 5: pysam cannot parse it"),
    ("1 2 . C", r"line 5: pysam cannot parse it"),
    ("1 5 . A <DEL> . . END=99 GT 0/1", r"line 5: the deletion ends at 99, past the record's 14 bases"),
]


@pytest.mark.parametrize(("line", "problem"), BAD)
def test_bad_lines_are_named_or_left_out(tmp_path: Path, genome: Genome, line: str, problem: str) -> None:
    file = vcf(tmp_path / "a.vcf", line, "1 3 . G T . . . GT 0/1")
    with pytest.raises(GenomeError, match=problem) as raised:
        list(iter_variants(file, genome))
    left_out: list[LeftOut] = []
    assert [v.line for v in iter_variants(file, genome, left_out)] == [6]
    assert left_out == [LeftOut(file, raised.value.problem)]


@pytest.mark.parametrize("bgzip", [True, False])
def test_a_compressed_file_that_is_cut_short_is_named(tmp_path: Path, genome: Genome, bgzip: bool) -> None:
    text = vcf(tmp_path / "a.vcf", *["1 3 . G T . . . GT 0/1"] * 3).read_bytes()
    file = tmp_path / "a.vcf.gz"
    with pysam.BGZFile(str(file), "wb") if bgzip else gzip.open(file, "wb") as out:
        out.write(text)
    assert len(list(iter_variants(file, genome))) == 3
    file.write_bytes(file.read_bytes()[:120])
    with pytest.raises(GenomeError, match=r"a\.vcf\.gz: "):
        list(iter_variants(file, genome))


def test_tables(tmp_path: Path, genome: Genome) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("##note\nname\tCHROM\tpos\tref\tALT\n\nx\tchr1\t2\tC\tT,*\ny\t2\t4\tG\t.\nz\t1\t3\n")
    left_out: list[LeftOut] = []
    found = list(iter_variants(file, genome, left_out))
    assert found == [
        Variant(4, 0, 1, "C", (Allele(2, "T"), Allele(2, None, "spanning deletion"))),
        Variant(5, 1, 3, "G", ()),
    ]
    assert left_out == [LeftOut(file, "line 6: 3 columns separated by tabs, expected 5")]
    out = tmp_path / "o.tsv"
    write_scored(file, out, {4: [(0.5, ""), (None, "spanning deletion")], 5: []}, "about")
    assert out.read_text() == (
        "##note\nname\tCHROM\tpos\tref\tALT\tssm_dll\tssm_note\n"
        "x\tchr1\t2\tC\tT,*\t0.5,.\t.,spanning deletion\ny\t2\t4\tG\t.\t.\t.\n"
    )
    file.write_text("chrom\tpos\tref\n")
    with pytest.raises(GenomeError, match="the column 'alt' is missing"):
        list(iter_variants(file, genome))
    with pytest.raises(GenomeError, match="has ssm_dll, ssm_note already"):
        check_output(out, tmp_path / "p.tsv")
    with pytest.raises(ValueError, match=r"o.tsv is a table: expected a name that ends in .tsv or .txt"):
        check_output(out, tmp_path / "p.vcf")
    with pytest.raises(ValueError, match="the input itself"):
        check_output(out, out)


@pytest.mark.parametrize("ending", [".vcf", ".vcf.gz"])
def test_scored_vcf_is_valid_and_keeps_what_there_was(tmp_path: Path, genome: Genome, ending: str) -> None:
    file = vcf(
        tmp_path / "a.vcf",
        "1 2 rs1 C T,* 7 PASS ZZ=3 GT 0/1",
        "1 3 . A T . . . GT 0/1",
        "chr2 1 . G . . . . GT 0/0",
    )
    packed = tmp_path / "a.vcf.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    out = tmp_path / f"o{ending}"
    scores = {5: [(-1.25, ""), (None, "spanning deletion")], 7: []}
    write_scored(packed, out, scores, 'log "P"')
    with pysam.VariantFile(str(out)) as read:
        assert read.header.info["SSM_DLL"].number == "A"
        assert read.header.info["SSM_DLL"].type == "Float"
        assert read.header.info["SSM_DLL"].description == "log 'P'"
        assert "chr2" in read.header.contigs
        records = list(read)
    one = records[0]
    assert (one.chrom, one.pos, one.id, one.qual, one.info.get("ZZ")) == ("1", 2, "rs1", 7, "3")
    assert records[0].info["SSM_DLL"] == (-1.25, None)
    assert records[0].info["SSM_NOTE"] == (".", "spanning_deletion")
    assert records[0].samples["ann"]["GT"] is not None
    assert (records[1].chrom, records[1].alts, len(records)) == ("chr2", None, 2)
    assert (out.read_bytes()[:2] == b"\x1f\x8b") == (ending == ".vcf.gz")
    with pytest.raises(GenomeError, match="has SSM_DLL, SSM_NOTE already"):
        check_output(out, tmp_path / "p.vcf")


def test_a_journal_goes_on_and_drops_what_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "j"
    with Journal(file, {"a": 1, "b": (2,)}) as first:
        first.add([("x", [0.1, None]), ("y", 2)])
    with open(file, "a") as out:
        out.write('["z", 3')
    with Journal(file, {"a": 1, "b": [2]}) as again:
        assert again.done == {"x": [0.1, None], "y": 2}
        again.add([("z", 4)])
    with Journal(file, {"a": 1, "b": [2]}) as third:
        assert third.done == {"x": [0.1, None], "y": 2, "z": 4}
        assert third.differs == ()
    with Journal(file, {"a": 2, "c": 0}) as other:
        assert (other.done, other.differs) == ({}, ("a", "b", "c"))
        other.remove()
    assert not file.exists()


def test_bedgraph_joins_equal_neighbours(tmp_path: Path) -> None:
    nan = float("nan")
    write_bedgraph(tmp_path / "t", "x", [Track("c", 10, [1.0, 1.0, nan, 2.5, 2.5, 0.125]), Track("d", 0, [])])
    assert (tmp_path / "t").read_text() == (
        'track type=bedGraph name="x"\nc\t10\t12\t1\nc\t13\t15\t2.5\nc\t15\t16\t0.125\n'
    )


def test_coverage_of_intervals_and_reads(tmp_path: Path, genome: Genome) -> None:
    bed = tmp_path / "a.bed"
    bed.write_text("1\t0\t4\nchr1\t2\t6\t.\t0\t-\n2\t0\t3\n")
    assert coverage(bed, genome, 0, 1, 8).tolist() == [1, 2, 2, 1, 1, 0, 0]
    header = {"HD": {"VN": "1.6", "SO": "coordinate"}, "SQ": [{"SN": "1", "LN": 14}]}
    with pysam.AlignmentFile(str(tmp_path / "a.bam"), "wb", header=header) as out:
        for start, length in ((1, 3), (2, 4)):
            read = pysam.AlignedSegment(out.header)
            read.query_name, read.query_sequence = f"r{start}", "ACGT"[:length]
            read.reference_id, read.reference_start, read.cigarstring = 0, start, f"{length}M"
            read.mapping_quality, read.flag = 60, 0
            out.write(read)
    with pytest.raises(GenomeError, match="has no index beside it"):
        coverage(tmp_path / "a.bam", genome, 0, 0, 8)
    pysam.index(str(tmp_path / "a.bam"))
    assert coverage(tmp_path / "a.bam", genome, 0, 0, 8).tolist() == [0, 1, 2, 2, 1, 1, 0, 0]
    with pytest.raises(GenomeError, match="knows no record '2'"):
        coverage(tmp_path / "a.bam", genome, 1, 0, 4)

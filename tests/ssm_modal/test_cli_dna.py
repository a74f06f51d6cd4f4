"""`ssm-modal score`, `mutate`, `embed` and `tracks`: files in, files out, bad input, and jobs that go on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("Bio")
pytest.importorskip("pysam")
pytest.importorskip("matplotlib")

import pysam

import ssm_modal
from ssm_modal.cli import score
from ssm_modal.cli.main import main
from ssm_modal.genomics import VariantScorer
from ssm_modal.tokenizers import CharTokenizer, NucleotideTokenizer

PNG = b"\x89PNG"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a FASTA of two records, a VCF and a BED file; the working directory too."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(4, (n,), generator=generator).tolist() for n in (300, 60)]
    one, two = ("".join("ACGT"[i] for i in digits) for digits in drawn)
    (tmp_path / "g.fa").write_text(f">chr1 first\n{one[:200]}\n{one[200:].lower()}\n>chr2\n{two}\n")
    torch.manual_seed(0)
    model = ssm_modal.create_model("mamba_lm", vocab_size=9, d_model=8, n_layers=1, d_state=4)
    model.save_pretrained(tmp_path / "model")
    NucleotideTokenizer().save(tmp_path / "model" / "tokenizer.json")
    lines = ["##fileformat=VCFv4.2", "##contig=<ID=1>", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for number in range(1, 6):
        at = 40 * number
        ref = one[at - 1]
        alts = [ref, next(b for b in "ACGT" if b != ref), "*"]
        lines.append(f"1\t{at}\tv{number}\t{ref}\t{','.join(alts)}\t.\t.\t.")
    (tmp_path / "v.vcf").write_text("\n".join(lines) + "\n")
    (tmp_path / "r.bed").write_text("chr1\t10\t50\tone\t0\t-\n2\t0\t60\n")
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(command: str, *options: object) -> int:
    common = ["--model", "model", "--device", "cpu", "--fasta", "g.fa"]
    return main([command, *common, *(str(o) for o in options)])


def read_scores(file: Path) -> list[tuple[float | None, ...]]:
    with pysam.VariantFile(str(file)) as source:
        return [record.info["SSM_DLL"] for record in source]


def test_score_goes_on_where_it_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--variants", "v.vcf", "--window", 50, "--out", "o.vcf")
    assert line("score", *options) == 0
    assert capsys.readouterr().out == "o.vcf: 5 variants, 10 alternatives scored, 5 without a score\n"
    whole = (place / "o.vcf").read_bytes()
    found = read_scores(place / "o.vcf")
    assert all(own == 0.0 and other and star is None for own, other, star in found)
    (place / "o.vcf").unlink()
    monkeypatch.setattr(score, "CHUNK", 2)
    scored: list[int] = []
    real = VariantScorer.score

    def stops(self: VariantScorer, variants: Any) -> Any:
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.extend(v.line for v in variants)
        return real(self, variants)

    monkeypatch.setattr(VariantScorer, "score", stops)
    assert line("score", *options) == 130
    assert not (place / "o.vcf").exists()
    scored.append(0)  # the next start does not stop
    assert line("score", *options) == 0
    assert scored == [4, 5, 6, 7, 0, 8]
    assert (place / "o.vcf").read_bytes() == whole
    assert not list(place.glob(".*progress"))
    assert line("score", "--variants", "v.vcf", "--window", 60, "--out", "o.vcf") == 0
    assert (place / "o.vcf").read_bytes() != whole


def test_an_unfinished_job_of_another_kind_is_begun_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(score, "write_scored", broken)
    assert line("score", "--variants", "v.vcf", "--window", 50, "--out", "o.vcf") == 1
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("SSM_MODAL_CACHE", str(place / "cache"))
    capsys.readouterr()
    assert line("score", "--variants", "v.vcf", "--window", 40, "--out", "o.vcf") == 0
    said = capsys.readouterr().err
    assert "the unfinished job beside o.vcf had another window: it was begun anew" in said


def test_bad_variants_are_named_or_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(place / "v.vcf", "a") as file:
        file.write("7\t3\t.\tA\tC\t.\t.\t.\n")
    options = ("--variants", "v.vcf", "--window", 50, "--out", "o.vcf")
    assert line("score", *options) == 1
    assert "v.vcf: line 9: there is no record '7'" in capsys.readouterr().err
    assert not (place / "o.vcf").exists()
    assert line("score", *options, "--skip-bad") == 0
    assert "1 left out, listed in o.vcf.left_out.csv" in capsys.readouterr().err
    with open(place / "o.vcf.left_out.csv", newline="") as listed:
        rows = list(csv.reader(listed))
    assert rows[0] == ["path", "reason"]
    assert rows[1][0] == "v.vcf"
    assert rows[1][1].startswith("line 9: there is no record '7'")
    assert len(read_scores(place / "o.vcf")) == 5
    assert line("score", "--variants", "v.vcf", "--out", "o.vcf") == 1
    assert "window is 4096, but the longest record has 300 bases" in capsys.readouterr().err


def test_a_table_gets_the_scores_of_the_vcf(place: Path) -> None:
    with pysam.VariantFile(str(place / "v.vcf")) as source:
        rows = [f"{r.id}\t{r.chrom}\t{r.pos}\t{r.ref}\t{','.join(r.alts)}\n" for r in source]
    (place / "v.tsv").write_text("id\tchrom\tpos\tref\talt\n" + "".join(rows))
    for name in ("v.vcf", "v.tsv"):
        assert line("score", "--variants", name, "--window", 50, "--out", f"o.{name[2:]}") == 0
    table = list(csv.DictReader((place / "o.tsv").open(), delimiter="\t"))
    assert [row["id"] for row in table] == ["v1", "v2", "v3", "v4", "v5"]
    for row, (own, other, _) in zip(table, read_scores(place / "o.vcf")):
        values = row["ssm_dll"].split(",")
        assert float(values[0]) == own
        assert float(values[1]) == pytest.approx(other, rel=1e-4)
        assert values[2] == "."
        assert row["ssm_note"] == ".,.,spanning deletion"


def test_mutate_has_the_scores_of_score(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("score", "--variants", "v.vcf", "--window", 50, "--out", "o.vcf") == 0
    assert line("mutate", "--region", "chr1:71-90", "--window", 50, "--out", "m") == 0
    assert (place / "m" / "mutations.png").read_bytes()[:4] == PNG
    table = list(csv.DictReader((place / "m" / "mutations.tsv").open(), delimiter="\t"))
    assert len(table) == 60
    with pysam.VariantFile(str(place / "o.vcf")) as source:
        record = list(source)[1]
    row = next(r for r in table if (r["pos"], r["alt"]) == ("80", record.alts[1]))
    assert row["ref"] == record.ref
    assert float(row["ssm_dll"]) == pytest.approx(record.info["SSM_DLL"][1], rel=1e-4)
    track = (place / "m" / "mutations.bedgraph").read_text().splitlines()
    mean = sum(float(r["ssm_dll"]) for r in table if r["pos"] == "80") / 3
    values = next(cells for cells in map(str.split, track[1:]) if cells[:3] == ["chr1", "79", "80"])
    assert float(values[3]) == pytest.approx(mean, rel=1e-3)
    assert sorted(p.name for p in (place / "m").iterdir()) == [
        "mutations.bedgraph", "mutations.png", "mutations.tsv"
    ]  # fmt: skip
    assert line("mutate", "--region", "chr1:71-90(-)", "--out", "m") == 1
    assert "expected no strand" in capsys.readouterr().err
    assert line("mutate", "--region", "chr1:71-301", "--out", "m") == 1
    assert "record 'chr1': bases 70 to 301 (0-based) go past its 300 bases" in capsys.readouterr().err


def test_tracks_of_likelihood_and_coverage(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("tracks", "--region", "1:1-300", "--coverage", "r.bed", "--out", "t", "--segment", 64) == 0
    assert "mean log P(base) -" in capsys.readouterr().out
    covered = (place / "t" / "coverage.bedgraph").read_text().splitlines()
    assert covered[1:] == ["chr1\t0\t10\t0", "chr1\t10\t50\t1", "chr1\t50\t300\t0"]
    likelihood = (place / "t" / "likelihood.bedgraph").read_text().splitlines()
    assert likelihood[1].startswith("chr1\t0\t1\t-")
    assert likelihood[-1].split()[2] == "300"
    for name in ("coverage", "likelihood"):
        assert (place / "t" / f"{name}.png").read_bytes()[:4] == PNG
    assert main(["tracks", "--fasta", "g.fa", "--region", "chr1", "--out", "t"]) == 1
    assert "neither --model nor --coverage is given" in capsys.readouterr().err
    (place / "other").mkdir()
    options = ["tracks", "--fasta", "g.fa", "--region", "chr1", "--coverage", "r.bed", "--out", "u"]
    assert main([*options, "--model", "other"]) == 1
    assert not (place / "u").exists()


def test_embed_records_and_intervals(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("embed", "--out", "e.safetensors", "--by", "position", "--segment", 33) == 0
    assert capsys.readouterr().out == "e.safetensors: 2 sequences, 360 bases\n"
    whole = load_file("e.safetensors")
    model = ssm_modal.load_pretrained("model")
    ids = NucleotideTokenizer().encode_ids("".join((place / "g.fa").read_text().split(">")[2].split()[1:]))
    with torch.inference_mode():
        torch.testing.assert_close(whole["chr2"], model.hidden(ids[None])[0][0])
    assert line("embed", "--bed", "r.bed", "--out", "b.safetensors") == 0
    embeddings = load_file("b.safetensors")["embeddings"]
    torch.testing.assert_close(embeddings[1], whole["chr2"].mean(0))
    assert line("embed", "--bed", "r.bed", "--out", "o.h5", "--strand", "other", "--by", "window") == 0
    h5py = pytest.importorskip("h5py")
    with h5py.File("o.h5") as file:
        assert sorted(file) == ["2:1-60", "one"]
    (place / "r.gff").write_text("2\tx\tgene\t1\t60\t.\t-\t.\tID=g\n")
    assert line("embed", "--bed", "r.gff", "--strand", "other", "--out", "g.safetensors") == 0
    torch.testing.assert_close(load_file("g.safetensors")["embeddings"][0], whole["chr2"].mean(0))
    assert line("embed", "--out", "e.npy") == 1
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err


def test_bad_intervals_and_records(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "r.bed").write_text("chr2\t0\t60\nchr2\t50\t61\nchr2\t0\t60\n")
    options = ("embed", "--bed", "r.bed", "--out", "e.safetensors", "--by", "position")
    assert line(*options) == 1
    assert "r.bed: line 2: record 'chr2': bases 50 to 61 (0-based) go past its 60" in capsys.readouterr().err
    assert line(*options, "--skip-bad") == 0
    assert "r.bed,line 2: record 'chr2'" in (place / "e.safetensors.left_out.csv").read_text().replace(
        '"', ""
    )
    assert sorted(load_file("e.safetensors")) == ["chr2:1-60 #1", "chr2:1-60 #2"]
    (place / "bad.fa").write_text(">x\n>x\nACGT\n>y\nAC!T\n>z\nACGT\n")
    bad = ["embed", "--model", "model", "--device", "cpu", "--fasta", "bad.fa", "--out", "f.safetensors"]
    assert main(bad) == 1
    assert "record 'x' (line 1) has no sequence" in capsys.readouterr().err
    assert main([*bad, "--skip-bad"]) == 0
    listed = (place / "f.safetensors.left_out.csv").read_text()
    assert [n in listed for n in ("record 'x' (line 1) has no sequence", "line 5", "letter '!'")] == [
        True
    ] * 3


def test_a_tokenizer_of_text_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CharTokenizer("ACGT").save(place / "model" / "tokenizer.json")
    assert line("embed", "--out", "e.safetensors") == 1
    assert "is a CharTokenizer, expected one of DNA" in capsys.readouterr().err

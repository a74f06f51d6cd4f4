"""Species windows: exact shared k-mers, what is taken out of training, folds, lengths, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("Bio")

from ssm_modal.datamodules.dna_plan import Stretch
from ssm_modal.datamodules.kmer_sharing import canonical_kmers, kmer_set, shared_fraction
from ssm_modal.datamodules.species import SpeciesDataModule
from ssm_modal.datamodules.species_plan import SpeciesSplit, fold_stretches, plan_species
from ssm_modal.io.genome import open_genome
from ssm_modal.io.nucleotides import GenomeError, letters_of, reverse_complement, text_of
from ssm_modal.tokenizers import NucleotideTokenizer


def drawn(n: int, seed: int) -> str:
    return "".join("ACGT"[i] for i in np.random.default_rng(seed).integers(0, 4, n))


def turned(text: str) -> str:
    return text_of(reverse_complement(letters_of(text)))


def array(text: str) -> np.ndarray:
    return letters_of(text).numpy()


def slow_kmers(text: str, k: int) -> list[str | None]:
    words = [text[i : i + k] for i in range(len(text) - k + 1)]
    return [None if set(w) - set("ACGT") else min(w, turned(w)) for w in words]


@pytest.mark.parametrize("k", [1, 5, 24, 32])
def test_canonical_kmers_are_those_of_strings(k: int) -> None:
    text = drawn(60, 0) + "N" + drawn(50, 1)
    codes, known = canonical_kmers(array(text), k)
    slow = slow_kmers(text, k)
    wanted = [
        None if w is None else sum("ACGT".index(c) << (2 * (k - 1 - i)) for i, c in enumerate(w))
        for w in slow
    ]
    assert [int(c) if ok else None for c, ok in zip(codes, known)] == wanted
    assert canonical_kmers(array("ACG"), 24)[0].shape == (0,)
    if k == 24:
        assert kmer_set([array(text)], k).tolist() == sorted({w for w in wanted if w is not None})


def test_shared_fraction_counts_whole_kmers_of_blocks_on_either_strand() -> None:
    other = drawn(90, 2)
    text = drawn(40, 3) + turned(other)[10:45] + drawn(25, 4) + "N" * 20 + other[:7]
    kmers = kmer_set([array(other)], 12)
    inside = set(slow_kmers(other, 12))
    found = shared_fraction(array(text), kmers, 12, 20)
    for block in range(len(found)):
        own = [w for w in slow_kmers(text[block * 20 : block * 20 + 20], 12) if w is not None]
        assert found[block] == pytest.approx(sum(w in inside for w in own) / max(1, len(own)))
    assert found.max() == 1.0
    assert (found == 0).sum() >= 3
    with pytest.raises(ValueError, match="block is 10, expected at least k, 12"):
        shared_fraction(array(text), kmers, 12, 10)


def test_folds_are_contiguous_and_equal(tmp_path: Path) -> None:
    (tmp_path / "g.fa").write_text(f">a\n{drawn(70, 0)}\n>b\n{drawn(30, 1)}\n")
    genome = open_genome([tmp_path / "g.fa"], tmp_path / "cache")
    assert fold_stretches(genome, [0, 1], 4) == [
        (Stretch(0, 0, 25),),
        (Stretch(0, 25, 50),),
        (Stretch(0, 50, 70), Stretch(1, 0, 5)),
        (Stretch(1, 5, 30),),
    ]


def test_what_relatives_hold_out_is_not_trained_on(tmp_path: Path) -> None:
    """Class b has a stretch of a's test fold, turned, in its training: that block goes, all others stay."""
    a, b = drawn(500, 0), drawn(500, 1)
    stolen = turned(a[20:80])
    b = b[:310] + stolen[:30] + b[340:]
    for name, text in (("a", a), ("b", b)):
        (tmp_path / f"{name}.fa").write_text(f">{name}\n{text}\n")
    genome = open_genome([tmp_path / "a.fa", tmp_path / "b.fa"], tmp_path / "cache")
    plan = plan_species(genome, [[0], [1]], SpeciesSplit(5, 0, True, k=12, block=50, max_shared=0.05))
    assert plan.held["test"] == ((Stretch(0, 0, 100),), (Stretch(1, 0, 100),))
    assert plan.held["validation"] == ((Stretch(0, 100, 200),), (Stretch(1, 100, 200),))
    assert (plan.removed, plan.candidates) == ((0, 1), (6, 6))
    joined = {label: "".join(text_of(p.letters) for p in plan.pieces if p.label == label) for label in (0, 1)}
    assert joined == {0: a[200:], 1: b[200:300] + b[350:]}
    # 30 bases of 50 hold 19 of the block's 39 12-mers.
    most = SpeciesSplit(5, 0, True, k=12, block=50, max_shared=19 / 39)
    assert plan_species(genome, [[0], [1]], most).removed == (0, 1)
    more = SpeciesSplit(5, 0, True, k=12, block=50, max_shared=20 / 39)
    assert plan_species(genome, [[0], [1]], more).removed == (0, 0)
    # Not in a held-out fold: nothing goes. Its own class does not count either.
    later = SpeciesSplit(5, 2, False, k=12, block=50)
    assert plan_species(genome, [[0], [1]], later).removed == (0, 0)
    assert plan_species(genome, [[0], [1]], later).candidates == (8, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        (tmp_path / f"{name}.fa").write_text(f">{name}1\n{drawn(900, i)}\n>{name}2\n{drawn(100, i + 9)}\n")
    return tmp_path


def module(folder: Path, **more: Any) -> SpeciesDataModule:
    settings: dict[str, Any] = {
        "lengths": [16, 64],
        "test_lengths": [16, 64],
        "batch_tokens": 128,
        "kmer": 12,
        "block": 50,
        "seed": 0,
        "cache_dir": str(folder / "cache"),
    }
    return SpeciesDataModule(str(folder), {"x": "a.fa", "y": "b.fa", "z": "c.fa"}, **{**settings, **more})


def test_training_batches(folder: Path) -> None:
    data = module(folder, length_warmup=3)
    assert [data.make_training(i, 0, 1)["ids"].shape for i in range(3)] == [(8, 16)] * 3
    later = [data.make_training(i, 0, 1) for i in range(3, 23)]
    assert {tuple(b["ids"].shape) for b in later} == {(8, 16), (2, 64)}
    assert set(torch.cat([b["labels"] for b in later]).tolist()) == {0, 1, 2}
    tokens = NucleotideTokenizer()
    texts = ["|".join(text_of(p.letters) for p in data.plan.pieces if p.label == label) for label in range(3)]
    strands = []
    for batch in later:
        for ids, label in zip(batch["ids"], batch["labels"].tolist()):
            text = tokens.decode(ids)
            strands.append(text in texts[label])
            assert text in texts[label] or turned(text) in texts[label]
    assert 0.2 < sum(strands) / len(strands) < 0.8
    again = module(folder, length_warmup=3)
    assert all(torch.equal(later[4][k], again.make_training(7, 0, 1)[k]) for k in later[4])
    halves = [again.make_training(7, rank, 2)["ids"] for rank in (0, 1)]
    assert halves[0].shape == later[4]["ids"].shape
    assert not torch.equal(*halves)
    held = [data.genome.read(s.record, s.start, s.end) for own in data.plan.held["test"] for s in own]
    assert not any(text_of(one)[:30] in text for one in held for text in texts)


def test_evaluation_goes_through_windows_end_to_end(folder: Path) -> None:
    data = module(folder, test_fold=4, val_windows=2)
    windows = data.evaluation_windows("test")
    # The fold holds 100 bases of the first record and all 100 of the second.
    assert len(windows) == 3 * (6 + 6) + 3 * (1 + 1)
    assert [w.start for w in windows[:12]] == [800 + 16 * i for i in range(6)] + [16 * i for i in range(6)]
    assert [w.block(64) for w in windows[3:7]] == [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 1, 0)]
    batches = list(data.test_dataloader())
    assert torch.cat([b["recordings"] for b in batches]).tolist() == list(range(len(windows)))
    tokens = NucleotideTokenizer()
    for batch in batches:
        assert batch["ids"].numel() <= 128
        for ids, label, number in zip(batch["ids"], batch["labels"], batch["recordings"]):
            w = windows[int(number)]
            assert (int(label), ids.shape[0]) == (w.label, w.length)
            assert tokens.decode(ids) == text_of(data.genome.read(w.record, w.start, w.start + w.length))
    assert len(data.evaluation_windows("validation")) == 3 * 2 + 3 * 2
    assert data.predicted_files()[0] == "a1:801-816"
    assert module(folder, validation=False).val_dataloader() == []


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"lengths": [16, 801]}, r"a training window has 801 bases, but no stretch of 'x' has as many"),
        ({"test_lengths": [16, 201]}, "no window of 201 bases lies in a test stretch of 'x'"),
        ({"test_fold": 5}, "test_fold is 5, expected 0 to 4"),
        ({"lengths": [64, 16]}, r"lengths is \[64, 16\], expected rising numbers"),
        ({"max_shared": 0.0}, "max_shared is 0.0, expected more than 0"),
        ({"tokenizer": "byte"}, "tokenizer is 'byte', one of text"),
    ],
)
def test_what_is_refused(folder: Path, more: dict[str, Any], problem: str) -> None:
    def use() -> None:
        data = module(folder, **more)
        data.evaluation_windows("test")
        data.make_training(0, 0, 1)

    with pytest.raises((ValueError, GenomeError), match=problem):
        use()


def test_a_checkpoint_of_another_fold_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="trained with test_fold 0, got 1"):
        module(folder, test_fold=1).load_state_dict(module(folder).state_dict())

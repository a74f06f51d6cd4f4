"""The data module of labelled sequences: packing, splits, strands, resume and bad lines."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from ssm_modal.datamodules.dna_labelled import DNAClassificationDataModule
from ssm_modal.io.nucleotides import GenomeError, letters_of, reverse_complement
from ssm_modal.tokenizers import NucleotideTokenizer

KMER: dict[str, Any] = {"ssm_modal_tokenizer": "kmer", "k": 4, "overlapping": False}
OVERLAPPING: dict[str, Any] = {**KMER, "overlapping": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 sequences to train on of labels 2 and 10, 4 to validate on, 5 to test on, of 10 to 30 bases."""
    generator = random.Random(7)
    data = tmp_path / "task"
    data.mkdir()
    for name, count in (("train", 12), ("dev", 4), ("test", 5)):
        rows = [
            f"{''.join(generator.choices('ACGT', k=generator.randint(10, 30)))},{(2, 10)[i % 2]}"
            for i in range(count)
        ]
        (data / f"{name}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    return data


def module(folder: Path, **options: Any) -> DNAClassificationDataModule:
    return DNAClassificationDataModule(**{"path": str(folder), "batch_tokens": 64, "seed": 1, **options})


def pieces(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    borders = batch["cu_seqlens"].tolist()
    assert borders[0] == 0
    assert borders[-1] == batch["ids"].shape[1]
    return [batch["ids"][0, a:b].tolist() for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("spec", ["nucleotide", KMER, OVERLAPPING])
def test_sequences_are_packed_whole_with_their_classes(folder: Path, spec: Any) -> None:
    data = module(folder, tokenizer=spec)
    assert data.classes == ("2", "10")
    assert [len(data.sequences(s)) for s in ("train", "validation", "test")] == [12, 4, 5]
    batches = data.batches("train")
    seen: list[int] = []
    for index in range(40):
        batch = batches.make_training(index, 0, 1)
        assert set(batch) == {"ids", "cu_seqlens", "labels", "recordings"}
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert batch["ids"].shape[1] <= 64
        assert batch["ids"].shape[0] == 1
        for ids, label, row in zip(pieces(batch), batch["labels"].tolist(), batch["recordings"].tolist()):
            one = data.sequences("train")[row]
            assert ids == data.tokenizer.encode(one.sequence)
            assert data.classes[label] == one.label
            seen.append(row)
    epochs = [seen[i : i + 12] for i in range(0, len(seen) - 12, 12)]
    assert len(epochs) > 2
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_evaluation_goes_through_the_file_in_order(folder: Path) -> None:
    data = module(folder, reverse_complement=True, eval_batch_tokens=40)
    for loader, split in ((data.val_dataloader(), "validation"), (data.test_dataloader(), "test")):
        made = list(loader)
        assert list(itertools.chain(*(b["recordings"].tolist() for b in made))) == list(
            range(len(data.sequences(split)))
        )
        ids = list(itertools.chain(*map(pieces, made)))
        assert ids == [data.tokenizer.encode(one.sequence) for one in data.sequences(split)]


@pytest.mark.parametrize("spec", ["nucleotide", KMER])
def test_one_sequence_is_read_and_its_relevance_drawn(folder: Path, spec: Any) -> None:
    pytest.importorskip("matplotlib")
    from ssm_modal.plots import new_figure

    data = module(folder, tokenizer=spec)
    batches = data.batches("test")
    every = [one for i in range(batches.n_batches) for one in pieces(batches.make_evaluation(i, 0, 1))]
    assert [data.example_input("predict", i)[0].tolist() for i in range(5)] == every
    figure = new_figure(3, 2)
    relevance = torch.arange(float(len(every[3])))
    data.draw_relevance(figure, "test", 3, relevance)
    assert [bar.get_height() for bar in figure.axes[0].patches] == relevance.tolist()
    assert figure.axes[0].get_xlabel() == ("base" if spec == "nucleotide" else "token")


def test_training_reads_either_strand_and_draws_anew_each_epoch(folder: Path) -> None:
    data = module(folder, reverse_complement=True)
    tokenizer = NucleotideTokenizer()
    strands: dict[int, list[bool]] = {}
    for index in range(200):
        batch = data.batches("train").make_training(index, 0, 1)
        for ids, row in zip(pieces(batch), batch["recordings"].tolist()):
            letters = letters_of(data.sequences("train")[row].sequence)
            there = tokenizer.encode_letters(reverse_complement(letters)).tolist()
            assert ids in (tokenizer.encode_letters(letters).tolist(), there)
            strands.setdefault(row, []).append(ids == there)
    assert all(0.25 < sum(drawn) / len(drawn) < 0.75 for drawn in strands.values())
    assert len({tuple(drawn[:10]) for drawn in strands.values()}) > 6


def test_processes_workers_and_resume(folder: Path) -> None:
    data = module(folder, reverse_complement=True)
    batches = data.batches("train")
    alone = [batches.make_training(i, 0, 1)["ids"].tolist() for i in range(20)]
    pairs = [batches.make_training(i, r, 2)["ids"].tolist() for i in range(10) for r in range(2)]
    assert alone == pairs
    assert module(folder, seed=2).batches("train").make_training(0, 0, 1)["ids"].tolist() != alone[0]
    progress = SimpleNamespace(total=SimpleNamespace(processed=5))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=0, world_size=1)  # type: ignore[assignment]
    for workers in (0, 1):
        data.num_workers = workers
        got = [b["ids"].tolist() for b in itertools.islice(iter(data.train_dataloader()), 3)]
        assert got == alone[5:8]


@pytest.mark.filterwarnings("ignore")
def test_bad_lines_end_the_run_or_are_left_out(folder: Path) -> None:
    with open(folder / "test.csv", "a") as file:
        file.write("ACGTACGT,3\nAC,2\nA!CGT,2\n")
    with pytest.raises(GenomeError, match=r"test\.csv: line 9: sequence: letter '!' at base 2"):
        module(folder).setup()
    data = module(folder, skip_bad=True, tokenizer=OVERLAPPING)
    assert len(data.sequences("test")) == 5
    assert [one.reason for one in data.left_out] == [
        "line 9: sequence: letter '!' at base 2 is no nucleotide, expected one of ACGTRYSWKMBDHVN or U",
        "line 7: the label is '3', expected one of training's: 2, 10",
        "line 8: 2 bases are less than a token's 4",
    ]
    # Without overlap single bases stand for what is no whole k-mer.
    assert len(module(folder, skip_bad=True, tokenizer=KMER).sequences("test")) == 6


def test_predict_takes_new_sequences(folder: Path, tmp_path: Path) -> None:
    data = module(folder)
    assert data.predicted_files() == [f"test.csv:{line}" for line in range(2, 7)]
    assert data.sequences("predict") == data.sequences("test")
    table, fasta = tmp_path / "new.csv", tmp_path / "new.fa"
    table.write_text("sequence\nacgtACG\nGGN\n")
    fasta.write_text(">one x\nACG\nTACG\n>two\nGGN\n")
    for file, names in ((table, ["new.csv:2", "new.csv:3"]), (fasta, ["one", "two"])):
        data = module(folder, predict_file=str(file))
        assert data.predicted_files() == names
        assert data.input_files() == [file]
        batch = data.batches("predict").make_evaluation(0, 0, 1)
        assert NucleotideTokenizer().decode(batch["ids"][0].tolist()) == "ACGTACGGGN"
        assert batch["labels"].tolist() == [-100, -100]
        assert len(data.sequences("test")) == 5
    table.write_text("label,sequence\n10,ACGT\n,ACC\n")
    data = module(folder, predict_file=str(table))
    assert data.batches("predict").make_evaluation(0, 0, 1)["labels"].tolist() == [1, -100]
    fasta.write_text(">one\nAC\n")
    with pytest.raises(GenomeError, match=r"new\.fa: record 'one': 2 bases are less than a token's 4"):
        module(folder, predict_file=str(fasta), tokenizer=OVERLAPPING).setup()
    (folder / "test.csv").write_text("sequence\nACGT\n")
    with pytest.raises(GenomeError, match=r"test\.csv: line 1: the columns are \['sequence'\], expected seq"):
        module(folder).setup()


def test_what_is_not_there_and_bad_arguments(folder: Path) -> None:
    (folder / "dev.csv").unlink()
    assert module(folder).val_dataloader() == []
    with pytest.raises(ValueError, match=r"the validation split .* holds no sequence"):
        module(folder).batches("validation")
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        module(folder, train_file="none.csv").setup()
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        module(folder, batch_tokens=0)
    with pytest.raises(ValueError, match="eval_batch_tokens is 0"):
        module(folder, eval_batch_tokens=0)
    with pytest.raises(ValueError, match="tokenizer is 'byte', one of text"):
        module(folder, tokenizer="byte")
    data = module(folder)
    saved = data.state_dict()
    assert saved["classes"] == ["2", "10"]
    data.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"trained with classes \['1'\]"):
        data.load_state_dict({**saved, "classes": ["1"]})


@pytest.mark.skipif("SSM_MODAL_DATA" not in os.environ, reason="needs real data: SSM_MODAL_DATA is not set")
def test_gue() -> None:
    folder = Path(os.environ["SSM_MODAL_DATA"]) / "genomics/gue/prom/prom_300_tata"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = module(folder, batch_tokens=3000)
    assert data.classes == ("0", "1")
    assert {len(one.sequence) for one in data.sequences("test")} == {300}
    assert data.batches("train").make_training(0, 0, 1)["ids"].shape == (1, 3000)

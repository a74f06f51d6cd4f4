"""Classification by window length: intervals from blocks, tables of a test, and folds joined."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("Bio")

from benchmarks import species as benchmark
from ssm_modal.cli.main import main
from ssm_modal.tasks.bootstrap import block_bootstrap
from ssm_modal.tasks.species import WINDOW_COLUMNS, lengths_table, pool_folds
from tests.datamodules.test_species import drawn


def test_blocks_are_drawn_whole() -> None:
    right = torch.tensor([True] * 100 + [False] * 100)
    whole = torch.tensor([0] * 100 + [1] * 100)
    # Two blocks, of which a sample holds none, one or both: shares of 0, 1/2 and 1.
    assert block_bootstrap(right, whole) == (0.0, 1.0)
    low, high = block_bootstrap(right, torch.arange(200))
    assert 0.42 < low < 0.45
    assert 0.55 < high < 0.58
    assert block_bootstrap(right[:100], whole[:100]) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"right has shape \(200,\) and blocks \(3,\)"):
        block_bootstrap(right, torch.arange(3))


def test_lengths_and_pooled_folds(tmp_path: Path) -> None:
    def row(fold: int, length: int, block: str, right: bool) -> list[Any]:
        return [fold, length, "x", "c", 0, block, "x" if right else "y"]

    first = [row(0, 16, "0-0-0", True), row(0, 16, "0-0-0", True), row(0, 64, "0-0-0", False)]
    second = [row(1, 16, "0-0-0", False), row(1, 64, "0-0-0", True)]
    assert lengths_table(first).splitlines() == [
        "length,accuracy,low,high,windows,blocks",
        "16,1.0000,1.0000,1.0000,2,1",
        "64,0.0000,0.0000,0.0000,1,1",
    ]
    files = []
    for number, rows in enumerate((first, second)):
        files.append(tmp_path / f"{number}.csv")
        with open(files[-1], "w", newline="") as out:
            csv.writer(out).writerows([WINDOW_COLUMNS, *rows])
    lines = pool_folds(files).splitlines()
    # Blocks of two folds are apart though they share a number.
    assert lines[1].startswith("16,0.6667,0.0000,1.0000,3,2")
    with pytest.raises(ValueError, match="fold 0 is there twice"):
        pool_folds([files[0], files[0]])
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"x.csv: is no windows.csv"):
        pool_folds([tmp_path / "x.csv"])


def test_a_run_writes_its_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two species that differ in their bases: what a test of a trained run says of each length."""
    for name, letters in (("a", "ACGT"), ("b", "AAAT")):
        text = drawn(1500, 0).translate(str.maketrans("ACGT", letters))
        (tmp_path / f"{name}.fa").write_text(f">{name}\n{text}\n")
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("SSM_MODAL_DATA", str(tmp_path))
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    options = {
        "run_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 20,
        "trainer.val_check_interval": 20,
        "trainer.enable_progress_bar": "false",
        "model.overrides.d_model": 8,
        "model.overrides.n_layers": 1,
        "model.overrides.n_classes": 2,
        "model.schedule.warmup_steps": 0,
        "model.optimizer.lr": 0.02,
        "data.path": tmp_path,
        "data.classes": '{"a": "a.fa", "b": "b.fa"}',
        "data.lengths": "[32, 64]",
        "data.test_lengths": "[32, 128]",
        "data.val_lengths": "[32]",
        "data.length_warmup": 5,
        "data.batch_tokens": 512,
        "data.num_workers": 0,
        "data.block": 50,
        "data.kmer": 24,
    }
    args = [f"--{key}={value}" for key, value in options.items()]
    assert main(["fit", "--config", "genomics/species.yaml", *args]) == 0, capsys.readouterr().err
    with open(tmp_path / "run" / "lengths.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["length"], r["windows"], r["blocks"]) for r in rows] == [("32", "18", "6"), ("128", "4", "4")]
    assert float(rows[1]["accuracy"]) == 1.0
    assert float(rows[0]["low"]) <= float(rows[0]["accuracy"]) <= float(rows[0]["high"])
    capsys.readouterr()
    assert benchmark.main([str(tmp_path / "run" / "windows.csv")]) == 0
    assert capsys.readouterr().out == (tmp_path / "run" / "lengths.csv").read_text()
    with open(tmp_path / "run" / "windows.csv", newline="") as file:
        windows = list(csv.DictReader(file))
    assert {(w["fold"], w["class"], w["contig"]) for w in windows} == {("0", "a", "a"), ("0", "b", "b")}

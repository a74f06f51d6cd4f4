"""Two processes train as one does on twice the batch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.processes import run
from tests.tasks.tiny import command, weights


@pytest.mark.slow
def test_two_processes_train_as_one_on_twice_the_batch(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 5,
        "model.overrides.dropout": 0.0,
        # Samples have unequal numbers of targets, so the mean over processes of means would not be the mean.
        "data.uneven": "true",
        "data.val_batches": 3,
        # Adam divides by the root of the gradient's square: a larger eps keeps rounding from being magnified.
        "model.optimizer.eps": 1e-3,
        "trainer.val_check_interval": 5,
        "trainer.gradient_clip_val": 0.5,
    }
    two = {"trainer.strategy": "ddp", "trainer.devices": 2, "data.batch_size": 2}
    assert run(command(tmp_path / "two", **options, **two), ranks=2) == [0, 0]
    assert run(command(tmp_path / "one", **options, **{"data.batch_size": 4})) == [0]
    assert run(command(tmp_path / "half", **options, **{"data.batch_size": 2})) == [0]
    one, both, half = (weights(tmp_path / name) for name in ("one", "two", "half"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.allclose(half[n], v, rtol=1e-3, atol=1e-5) for n, v in one.items())

    assert_logged_alike(tmp_path, 6, ("train/loss", "grad_norm", "val/loss", "val/perplexity"))


@pytest.mark.slow
def test_a_synthetic_task_in_two_processes_learns_and_is_tested_as_in_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4,
        "model": "ssm_modal.tasks.SyntheticTask",
        "model.overrides.vocab_size": 16,
        "model.overrides.dropout": 0.0,
        "model.optimizer.eps": 1e-3,
        "data": "ssm_modal.datamodules.synthetic.SyntheticDataModule",
        "data.length": 16,
        "data.train_lengths": "[8, 16]",
        # Of these, the processes take unequal shares.
        "data.lengths": "[16, 40]",
        "data.sequences": 33,
        "data.val_lengths": "[40]",
        "data.val_sequences": 9,
        "data.val_tokens": 80,
        "test_after_fit": "true",
    }
    two = {"trainer.strategy": "ddp", "trainer.devices": 2, "data.batch_size": 3}
    assert run(command(tmp_path / "two", **options, **two), ranks=2) == [0, 0]
    assert run(command(tmp_path / "one", **options, **{"data.batch_size": 6})) == [0]
    both = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert_logged_alike(tmp_path, 6, ("train/loss", "val/loss", "val/loss_40", "val/accuracy_min"))
    lengths = (tmp_path / "two" / "lengths.csv").read_text()
    assert [line.split(",")[::2] for line in lengths.splitlines()[1:]] == [["16", "33"], ["40", "33"]]
    assert lengths == (tmp_path / "one" / "lengths.csv").read_text()


def assert_logged_alike(folder: Path, rows: int, names: Sequence[str]) -> None:
    """The runs "one" and "two" in `folder` logged `rows` rows each, with the same values under `names`."""
    logged = []
    for run_dir in ("one", "two"):
        with open(folder / run_dir / "metrics.csv", newline="") as file:
            logged.append(list(csv.DictReader(file)))
    assert len(logged[0]) == len(logged[1]) == rows
    for a, b in zip(*logged):
        for name in names:
            assert (a[name] == "") == (b[name] == "")
            if a[name]:
                assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-5), name

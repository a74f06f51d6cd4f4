"""Two processes train as one does on twice the batch."""

from __future__ import annotations

import csv
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

    def rows(name: str) -> list[dict[str, str]]:
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    assert len(rows("one")) == len(rows("two")) == 6
    for a, b in zip(rows("one"), rows("two")):
        for key in ("train/loss", "grad_norm", "val/loss", "val/perplexity"):
            assert (a[key] == "") == (b[key] == "")
            if a[key]:
                assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-5), key

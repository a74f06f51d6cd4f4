"""What a run shows of itself: tokens a second, on a terminal and off it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssm_modal.cli.callbacks import Progress, progress

BATCH = {"ids": torch.zeros(3, 100, dtype=torch.int64)}


class Run:
    """Two processes in training, by a clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.logged: list[tuple[str, float]] = []
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.module: Any = SimpleNamespace(log=lambda name, value: self.logged.append((name, value)))
        self.trainer: Any = SimpleNamespace(
            world_size=2,
            global_step=0,
            max_steps=10,
            log_every_n_steps=2,
            progress_bar_metrics={"train/loss": 1.5, "v_num": 0},
            state=SimpleNamespace(fn="fit"),
            sanity_checking=False,
        )
        self.shown = Progress(line_seconds=5)
        self.shown.on_train_start(self.trainer, self.module)

    def batch(self, now: float) -> None:
        self.now = now
        self.trainer.global_step += 1
        self.shown.on_train_batch_end(
            self.trainer, self.module, None, BATCH, batch_idx=self.trainer.global_step - 1
        )

    def validation(self, start: float, end: float) -> None:
        self.now = start
        self.shown.on_validation_start(self.trainer, self.module)
        self.now = end
        self.shown.on_validation_end(self.trainer, self.module)


def test_tokens_of_all_processes_by_the_time_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch)
    run.batch(now=1.0)
    assert run.logged == []
    run.validation(start=2.0, end=12.0)
    run.batch(now=14.0)
    # Two batches of 300 tokens in each of two processes, in 14 seconds of which 10 validated.
    assert run.logged == [("tokens_per_second", 300.0)]
    run.batch(now=15.0)
    run.batch(now=16.0)
    assert run.logged[1:] == [("tokens_per_second", 600.0)]
    assert capsys.readouterr().err.splitlines() == [
        "validation at step 1: train/loss 1.5",
        "step 2/10: train/loss 1.5, 300 tokens/s",
    ]


def test_the_bar_shows_tokens_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run = Run(monkeypatch)
    run.batch(now=1.0)
    run.batch(now=4.0)
    bar = run.shown._bar
    assert (bar.n, bar.total, bar.postfix) == (2, 10, "train/loss 1.5, 300 tokens/s")
    run.shown.on_train_end(run.trainer, run.module)
    assert "training" in capsys.readouterr().err
    assert run.shown._bar is None


def test_nothing_is_shown_when_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch)
    run.shown.disable()
    run.batch(now=30.0)
    run.validation(start=31.0, end=32.0)
    run.batch(now=60.0)
    assert capsys.readouterr().err == ""
    assert run.logged == [("tokens_per_second", 1200 / 59)]

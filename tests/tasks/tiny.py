"""A tiny run for the tests: a small Mamba with dropout over random tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from ssm_modal.datamodules.resumable import ResumableLoader, derived_generator, global_rows, run_seed

VOCAB, LENGTH = 11, 12

OVERRIDES: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 8, "n_layers": 1, "d_state": 4, "dropout": 0.2}


class TinyData(LightningDataModule):
    """Every sample a function of (seed, split, its number). `uneven`: some labels are left out, by the
    sample."""

    def __init__(
        self,
        batch_size: int = 2,
        val_batches: int = 2,
        num_workers: int = 0,
        uneven: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size, self.val_batches = batch_size, val_batches
        self.num_workers, self.uneven = num_workers, uneven

    def sample(self, split: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = derived_generator(run_seed(None), split, number)
        tokens = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        labels = tokens[1:].clone()
        if self.uneven:
            labels[: number % LENGTH] = -100
        return tokens[:-1], labels

    def rows(self, split: str, numbers: range) -> dict[str, torch.Tensor]:
        ids, labels = zip(*(self.sample(split, n) for n in numbers))
        return {"ids": torch.stack(ids), "labels": torch.stack(labels)}

    def train_batch(self, index: int, rank: int, world: int) -> dict[str, torch.Tensor]:
        return self.rows("train", global_rows(index, self.batch_size, rank, world))

    def val_batch(self, index: int, rank: int, world: int) -> dict[str, torch.Tensor]:
        # Batches of unequal size: 1, 2, 3, ... rows.
        return self.rows("val", range(index * 10, index * 10 + index + 1))

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader.training(self.train_batch, self.trainer, num_workers=self.num_workers)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader.evaluation(self.val_batch, self.val_batches, self.trainer)

    def test_dataloader(self) -> ResumableLoader:
        return ResumableLoader.evaluation(self.val_batch, self.val_batches, self.trainer)

    def stream(self, split: str) -> torch.Tensor:
        return torch.randint(VOCAB, (50,), generator=derived_generator(1, split))


class KillAt(Callback):
    """SIGKILL this process in the training batch `batch` (counted from 1 over the whole run), before its
    step."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def command(run_dir: Path, *, max_steps: int = 6, **options: Any) -> list[str]:
    """The command line of a tiny run; options by their dotted name."""
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": max_steps,
        "trainer.val_check_interval": 4,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": 1,
        "test_after_fit": "false",
        "model": "ssm_modal.tasks.LanguageModelling",
        "model.model": "mamba_lm",
        **{f"model.overrides.{name}": value for name, value in OVERRIDES.items()},
        "model.optimizer.lr": 0.01,
        "data": "tests.tasks.tiny.TinyData",
        **options,
    }
    return ["fit", *(f"--{name}={value}" for name, value in settings.items())]


def weights(run_dir: Path, name: str = "last") -> Mapping[str, torch.Tensor]:
    """The weights in a checkpoint of a run."""
    return load(run_dir, name)["state_dict"]


def load(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Bitwise equality of two sets of weights."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


class Predicting(Callback):
    """Writes to `file` how many batches a prediction went through, and kills the process behind batch
    `kill_after`, counted from 1; 0: never."""

    def __init__(self, file: str, kill_after: int = 0) -> None:
        self.file, self.kill_after = file, kill_after

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        Path(self.file).write_text(str(batch_idx + 1))
        if batch_idx + 1 == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

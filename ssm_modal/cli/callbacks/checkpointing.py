"""When a run saves: last, best, and every so many steps."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ssm_modal.io.atomic import sync_folder


class RunCheckpoint(Checkpoint):
    """Keeps last.ckpt, best.ckpt and, where asked for, step=NNNNNNNN.ckpt in the run's `checkpoints`.

    Saves only between optimizer steps: gradients that are being accumulated are in no checkpoint, so one
    taken between them could not be gone on with exactly.

    Args:
        every_n_steps: optimizer steps between two writes of last.ckpt; each validation and the end write it
            too.
        keep_every_n_steps: keep a checkpoint for good each time the step is a multiple of this; 0 keeps none.
        monitor: the validation metric that says which is best; None keeps no best.
        mode: whether a lower ("min") or a higher ("max") value is better.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep_every_n_steps: int = 0,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}, expected 1 or more")
        if keep_every_n_steps < 0:
            raise ValueError(f"checkpoint.keep_every_n_steps is {keep_every_n_steps}, expected 0 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode is {mode!r}, expected 'min' or 'max'")
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.monitor, self.mode = monitor, mode
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._saved_step = 0

    @property
    def state_key(self) -> str:
        return "RunCheckpoint"

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Values of another metric cannot be compared.
        if state_dict["monitor"] == self.monitor:
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Where the checkpoints of `trainer`'s run are."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Where a validation follows, `on_validation_end` saves: a run that goes on from a checkpoint taken
        # just before a validation would not make up for it.
        if step == self._saved_step or _accumulating(trainer) or _validation_follows(trainer):
            return
        if step % self.every_n_steps == 0 or self._keeps(step):
            self._save(trainer, [])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or _accumulating(trainer):
            return
        names = []
        if self.monitor is not None:
            if self.monitor not in trainer.callback_metrics:
                have = ", ".join(sorted(trainer.callback_metrics)) or "none"
                raise ValueError(
                    f"checkpoint.monitor is {self.monitor!r}, which was not measured; there are {have}"
                )
            score = float(trainer.callback_metrics[self.monitor])
            if self._better(score):
                self.best_score, self.best_step = score, trainer.global_step
                names.append("best")
        self._save(trainer, names)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step and not _accumulating(trainer):
            self._save(trainer, [])

    def _keeps(self, step: int) -> bool:
        return self.keep_every_n_steps > 0 and step % self.keep_every_n_steps == 0

    def _better(self, score: float) -> bool:
        if not math.isfinite(score):
            return False
        if self.best_score is None:
            return True
        return score < self.best_score if self.mode == "min" else score > self.best_score

    def _save(self, trainer: Trainer, names: list[str]) -> None:
        """Write the state once, under the further `names` and then as "last".

        A kill in between leaves a best.ckpt ahead of last.ckpt, and going on from last makes it again.
        """
        if getattr(trainer, "fast_dev_run", False):
            return
        step = trainer.global_step
        if self._keeps(step) and step != self._saved_step:
            names = [*names, f"step={step:08d}"]
        folder = self.folder(trainer)
        new = folder / ".new.ckpt"
        trainer.save_checkpoint(new)
        self._saved_step = step
        if trainer.is_global_zero:
            for name in names:
                _link(new, folder / f"{name}.ckpt")
            os.replace(new, folder / "last.ckpt")
            sync_folder(folder)


def _accumulating(trainer: Trainer) -> bool:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return done % trainer.accumulate_grad_batches != 0


def _validation_follows(trainer: Trainer) -> bool:
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or math.isinf(every):
        return False
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready % every == 0


def _link(source: Path, target: Path) -> None:
    """Give the file `source` the further name `target`, replacing what has that name."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        # File systems without hard links.
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)

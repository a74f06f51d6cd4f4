"""How a run shows where it is: a bar on a terminal, lines anywhere else; and tokens a second."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class Progress(ProgressBar):
    """Shows steps, losses and tokens a second, and logs `tokens_per_second`.

    Tokens are those of all processes; the time of validations is not counted.

    Args:
        line_seconds: how often a line is printed where standard error is no terminal.
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._enabled = True
        self._bar: Any = None
        self._since = self._line_at = time.monotonic()
        self._tokens = 0
        self._rate = math.nan
        self._validation_started = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = self._line_at = time.monotonic()
        self._tokens = 0
        if self._enabled and sys.stderr.isatty():
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar = tqdm(
                total=total,
                initial=trainer.global_step,
                unit="step",
                ncols=shutil.get_terminal_size().columns,
                desc="training",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += count_tokens(batch) * trainer.world_size
        step = trainer.global_step
        now = time.monotonic()
        if (batch_idx + 1) % max(1, getattr(trainer, "log_every_n_steps", 1)) == 0:
            if now > self._since:
                self._rate = self._tokens / (now - self._since)
                pl_module.log("tokens_per_second", self._rate)
            self._since, self._tokens = now, 0
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if now - self._line_at > 0.5:
                self._line_at = now
                self._bar.set_postfix_str(self._figures(trainer), refresh=False)
        elif self._enabled and now - self._line_at > self.line_seconds:
            self._line_at = now
            of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            print(f"step {step}{of}: {self._figures(trainer)}", file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += time.monotonic() - self._validation_started
        if self._enabled and self._bar is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            figures = self._figures(trainer)
            print(f"validation at step {trainer.global_step}: {figures}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _figures(self, trainer: Trainer) -> str:
        shown = {k: float(v) for k, v in trainer.progress_bar_metrics.items()}
        parts = [f"{name} {value:.4g}" for name, value in shown.items() if name != "v_num"]
        if math.isfinite(self._rate):
            parts.append(f"{self._rate:,.0f} tokens/s")
        return ", ".join(parts)


def count_tokens(batch: Any) -> int:
    """Tokens of a batch: the size of its `ids`."""
    ids = batch.get("ids") if isinstance(batch, dict) else None
    return ids.numel() if isinstance(ids, torch.Tensor) else 0

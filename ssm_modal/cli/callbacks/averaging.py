"""Average the weights over the training and validate, save and test the average."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(WeightAveraging):
    """An exponential moving average of the weights (Polyak and Juditsky, 1992), which is what counts.

    After every optimizer step behind `start_step`: average = decay * average + (1 - decay) * weights; up to
    it the average is the weights. Validation, `best.ckpt`, tests, generation and `load_pretrained` take the
    average; a checkpoint holds the weights too, so that a run goes on exactly.

    Lightning's `WeightAveraging` with three differences: the average lies where the model is, rather than on
    the host; a test after training tests the average, where Lightning's loads the weights; and a checkpoint
    written when training ends holds the weights, where Lightning's holds the average twice.

    Args:
        decay: share of the old average that stays at each step; 1 / (1 - decay) is about the number of
            steps that it spans.
        start_step: the step at whose weights the average starts; 0 as 1.

    Raises ValueError for arguments out of range, and when training starts for weights in half precision, in
    which a moving average stands still.
    """

    def __init__(self, decay: float = 0.99, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAverage.decay is {decay}, expected 0 or more and below 1")
        if start_step < 0:
            raise ValueError(f"WeightAverage.start_step is {start_step}, expected 0 or more")
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay, self.start_step = decay, start_step

    @property
    def state_key(self) -> str:
        return "WeightAverage"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is None:
            return
        for name, weight in pl_module.named_parameters():
            if weight.dtype in (torch.float16, torch.bfloat16):
                dtype = str(weight.dtype).removeprefix("torch.")
                raise ValueError(
                    f"WeightAverage: the weight {name} is {dtype}, too coarse for a moving average; take "
                    f"trainer.precision 32-true, bf16-mixed or 16-mixed instead of {trainer.precision}"
                )
        # The weights may have been moved and cast since the average was copied from them. Its counter stays
        # on the host, where it is read at every step.
        average = self._average_model.module
        theirs = itertools.chain(average.parameters(), average.buffers())
        ours = itertools.chain(pl_module.parameters(), pl_module.buffers())
        for mean, value in zip(theirs, ours):
            mean.data = mean.data.to(value.device, value.dtype)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._average_model is not None and self._latest_update_step < step <= self.start_step:
            # The update of this step then copies: the average starts at its weights.
            self._average_model.n_averaged.zero_()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The task measures in its own hook of this name, which comes later: swap back after it.
        return

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last checkpoint is written in this hook, after this callback's.
        return

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)
            # Tests that follow take what their checkpoint holds: the average.
            self._average_model = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Outside of training the average that the checkpoint holds as its weights is what is wanted.
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

"""SyntheticTask: train a model on a synthetic task, then test it at a list of lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.backbone import Segment, sum_over_segments
from ssm_modal.cli.logged_steps import logs_this_step
from ssm_modal.tasks.base import (
    DEFAULT_OPTIMIZER,
    DEFAULT_SCHEDULE,
    IGNORE,
    InitPart,
    OptimizerConfig,
    Recompute,
    ScheduleConfig,
    StepOutput,
    TrainingTask,
)
from ssm_modal.tasks.lengths import (
    SEGMENT,
    LengthResult,
    count_right,
    evaluate_setting,
    print_table,
    write_results,
)

_CHECKPOINT_KEY = "ssm_modal_synthetic"


class SyntheticTask(TrainingTask):
    """Learn to predict the labelled positions of sequences, and measure accuracy at many lengths.

    Logits are computed at labelled positions only. Validation logs `val/loss` and `val/accuracy` at the
    trained length, `val/loss_<length>` and `val/accuracy_<length>` at every other length that the data module
    validates, the greatest loss as `val/loss_max` and the least accuracy as `val/accuracy_min`. A test
    (`ssm-modal test`, or `fit` when it has ended) goes through every test setting of the data module, long
    sequences streamed through the state (see `ssm_modal.tasks.lengths`); the run's folder gets `lengths.csv`,
    `lengths_details.csv` and `lengths.png`.

    The data module must give what `SyntheticDataModule` gives: `length`, `chance`, `test_settings` and
    `test_batch`.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part, recompute: see `TrainingTask`.
        stop_at: end the training once every validated accuracy has been at least this (0 to 1) at
            `stop_checks` validations running; None trains to `trainer.max_steps`.
        stop_checks: see `stop_at`.
        segment: tokens of a sequence that go through the model at once in tests and validation.
        tokens_in_flight: tokens of a test batch that go through the model at once; None: 2^14 on a CPU, 2^19
            on CUDA.
        max_length: longer test settings are reported as n/a, for a model whose state grows with the length.
        train_segment: tokens of a sequence that go through the model at once in training and in validation at
            the trained length, exactly and in the memory of one segment
            (`ssm_modal.backbone.sum_over_segments`); None for the whole.
    """

    def __init__(
        self,
        model: str = "mamba_lm",
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: InitPart = "all",
        stop_at: float | None = None,
        stop_checks: int = 2,
        segment: int = SEGMENT,
        tokens_in_flight: int | None = None,
        max_length: int | None = None,
        train_segment: int | None = None,
        recompute: Recompute = "none",
    ) -> None:
        if stop_at is not None and not 0 < stop_at <= 1:
            raise ValueError(f"stop_at is {stop_at}, expected above 0 and at most 1, or None")
        for name, value in {
            "stop_checks": stop_checks,
            "segment": segment,
            "tokens_in_flight": tokens_in_flight,
            "max_length": max_length,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        super().__init__(model, overrides, optimizer, schedule, init_from, init_part, recompute)
        self.check_segment("train_segment", train_segment)
        self.train_segment = train_segment
        self.stop_at, self.stop_checks = stop_at, stop_checks
        self.segment, self.tokens_in_flight, self.max_length = segment, tokens_in_flight, max_length
        self.results: list[LengthResult] = []
        self._checks_passed = 0

    @property
    def data(self) -> Any:
        """The data module, known to have what the length tests need."""
        data = getattr(self.trainer, "datamodule", None)
        missing = [n for n in ("length", "chance", "test_settings", "test_batch") if not hasattr(data, n)]
        if missing:
            raise TypeError(
                f"SyntheticTask got the data {type(data).__name__}, expected a data module with "
                f"{', '.join(missing)}, such as SyntheticDataModule"
            )
        return data

    def setup(self, stage: str) -> None:
        super().setup(stage)
        _ = self.data

    # ------------------------------------------------------------------ training and validation

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, with the labelled positions found while the labels are still on the host.

        Looking for them on the device would make the host wait for it at every step.
        """
        if not isinstance(batch, dict) or "labels" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        rows, columns = torch.nonzero(batch["labels"] != IGNORE, as_tuple=True)
        found = {"rows": rows, "columns": columns, "targets": batch["labels"][rows, columns]}
        if device.type == "cuda":
            # From memory that is not pinned the copy would wait for all that the GPU still has to do.
            found = {name: value.pin_memory() for name, value in found.items()}
        return super().transfer_batch_to_device({**batch, **found}, device, dataloader_idx)

    def step(self, batch: Mapping[str, Any], stage: str) -> StepOutput:
        """The loss at the labelled positions; in validation accuracy too."""
        ids = batch["ids"]
        if stage == "val" and ids.shape[1] != self.data.length:
            got = count_right(self.model, ids, batch["labels"], segment=self.segment)
            nothing = torch.zeros((), device=ids.device)
            count = torch.tensor(float(len(batch["targets"])))
            right, streamed = torch.tensor(float(got.right)), torch.tensor(got.loss)
            sums = {f"accuracy_{ids.shape[1]}": (right, count), f"loss_{ids.shape[1]}": (streamed, count)}
            return StepOutput(nothing, nothing, sums)
        logits = self._labelled_logits(batch)
        targets = batch["targets"]
        count = torch.full((), len(targets), device=ids.device)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        if stage == "train":
            return StepOutput(loss, count)
        right_here = (logits.argmax(-1) == targets).sum()
        return StepOutput(loss, count, {"accuracy": (right_here, count)})

    def _labelled_logits(self, batch: Mapping[str, Any]) -> Tensor:
        model: Any = self.model
        rows, columns = batch["rows"], batch["columns"]
        if self.train_segment is None:
            hidden, _ = model.hidden(batch["ids"])
            return model.logits(hidden[rows, columns])

        def labelled(hidden: Tensor, segment: Segment) -> Tensor:
            """(labels, d_model): the vectors of those in this segment, zeros for the others."""
            inside = (columns >= segment.start) & (columns < segment.end)
            here = (columns - segment.start).clamp(0, hidden.shape[1] - 1)
            return torch.where(inside[:, None], hidden[rows, here], 0)

        hidden = sum_over_segments(
            lambda segment, state: model.hidden(segment.inputs[0], state, seqs=segment.seqs),
            labelled,
            (batch["ids"],),
            model.parameters(),
            self.train_segment,
        )
        return model.logits(hidden)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if not logs_this_step(self.trainer):
            return
        # The first group may be one that is kept as it started (multiplier 0): the rate without multipliers.
        moving = [g for g in optimizer.param_groups if g["initial_lr"] > 0]
        factor = moving[0]["lr"] / moving[0]["initial_lr"] if moving else 0.0
        self.log("lr", self.optimizer_config.lr * factor)

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        """The least accuracy and the greatest loss of all validated lengths."""
        if stage != "val":
            return {}
        greatest = max((v for name, v in means.items() if name.startswith("loss")), default=math.nan)
        return {"accuracy_min": _least_accuracy(means), "loss_max": greatest}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.stop_at is None or self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        passed = _least_accuracy(self.reduce_totals()) >= self.stop_at
        self._checks_passed = self._checks_passed + 1 if passed else 0
        if self._checks_passed >= self.stop_checks:
            self.trainer.should_stop = True

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`ids`, `labels` and `predicted`, (batch, length) int64 on the host.

        `predicted` is -100 but at labelled positions.
        """
        predicted = torch.full_like(batch["labels"], IGNORE)
        predicted[batch["rows"], batch["columns"]] = self._labelled_logits(batch).argmax(-1)
        found = {"ids": batch["ids"], "labels": batch["labels"], "predicted": predicted}
        return {name: value.cpu() for name, value in found.items()}

    # ------------------------------------------------------------------ lengths

    def _length_options(self) -> dict[str, Any]:
        return {
            "segment": self.segment,
            "tokens_in_flight": self.tokens_in_flight,
            "max_length": self.max_length,
            "device": self.device,
            "rank": int(self.trainer.global_rank),
            "world": int(self.trainer.world_size),
        }

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.results = []

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One test setting of the data module, every sequence of it."""
        self.results.append(
            evaluate_setting(self.model, self.data, int(batch["setting"]), **self._length_options())
        )

    def on_test_epoch_end(self) -> None:
        for result in self.results:
            if result.accuracy is not None:
                pairs = "" if result.pairs is None else f"_{result.pairs}"
                self.log(f"test/accuracy_{result.length}{pairs}", result.accuracy)
        self._report()

    def _report(self) -> None:
        """Write the results into the run's folder and print them."""
        if not self.trainer.is_global_zero or not self.results:
            return
        name = str(self.hparams["model"])
        title = f"{getattr(self.data, 'task', 'synthetic')}, {name}"
        write_results(
            self.run_dir, self.results, trained_length=self.data.length, chance=self.data.chance, title=title
        )
        print_table(self.results, title)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = {"checks_passed": self._checks_passed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._checks_passed = int(checkpoint.get(_CHECKPOINT_KEY, {}).get("checks_passed", 0))


def _least_accuracy(means: Mapping[str, float]) -> float:
    return min((v for name, v in means.items() if name.startswith("accuracy")), default=0.0)

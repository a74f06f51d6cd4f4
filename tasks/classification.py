"""Classification: one label a sequence, with accuracy, a confusion matrix and tables of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssm_modal.errors import ConfigError, listed
from ssm_modal.io.atomic import atomic_write
from ssm_modal.layers import set_time_step_scale
from ssm_modal.models import SequenceClassifierConfig
from ssm_modal.plots import confusion_plot, examples_plot
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
from ssm_modal.tasks.classification_tables import (
    classes_table,
    confusion_table,
    decided,
    predictions_table,
    telling_examples,
)
from ssm_modal.tasks.image_inputs import check_image_input
from ssm_modal.tasks.matthews import mcc, mcc_interval
from ssm_modal.tasks.prediction_parts import PredictionParts, prediction_key
from ssm_modal.tasks.relevance import relevance_plot

# What `examples.png` shows at most, and `relevance.png`.
_EXAMPLES, _EXPLAINED = 12, 6
_CHECKPOINT_KEY = "ssm_modal_classification"


class Classification(TrainingTask):
    """Learn the label of each sequence.

    A batch has `ids` or `waveform` (batch, length), or (1, total) packed by `cu_seqlens`, or `pixels` or
    `images`, see `TrainingTask`, and `labels` (sequences,) int64, the class, -100 where there is none.
    `recordings` (sequences,) int64 is optional: what number a sequence has in the data module. `in_training`
    (sequences,) bool is optional too: whether a sequence stands in training.

    Logs `train/loss`, and under `val/` or `test/`, exact over batches and processes:

        loss          nats a sequence, without label smoothing
        accuracy      the share recognised
        mcc           Matthews' correlation coefficient over the whole split, of one confusion matrix
        mcc_low, mcc_high   tests alone: where 95 % of its values lie over `bootstrap` resamplings of the
                      split's sequences
        sequences_new, accuracy_new, mcc_new   the same without the sequences that stand in training, where
                      the batches say which do

    A test (`ssm-modal test`, or `fit` when it has ended) writes into the run's folder:

        classes.csv       class, count (its sequences), right (those recognised)
        confusion.csv     a row a true class, a column a predicted one, sequences in each cell
        confusion.png     the same as a picture, with `plots`
        examples.png      with `plots`, sequences drawn: the wrong ones that the model was surest of, then the
                          right ones that it was least sure of
        relevance.png     with `plots`, the first six of them with what spoke for the class they were taken
                          for (gradient x input; `ssm-modal explain` does more)

    and `ssm-modal validate` the same into `validation/` there.

    `ssm-modal predict` writes `results/predictions.csv`: file, predicted, probability, the next classes with
    theirs (`top_k` in all), label (empty where it is not known), and with `plots` `results/predictions.png`
    and `results/relevance.png`.
    Each file is written whole or not at all; a prediction that was killed goes on behind the batches it had
    done, and writes what it would have written at one go.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part, recompute: see `TrainingTask`; the model
            is one that gives logits (sequences, n_classes), such as `audio_classifier`.
        label_smoothing: in training, the share of the target spread evenly over all classes, 0 to below 1.
        plots: draw the pictures too; `--plots` on the command line.
        time_step_scale: for a model of S4D layers alone, outside training: the rate it was trained at divided
            by that of the data, see `set_time_step_scale`; 2.0 tests a model of 8 kHz at 4 kHz.
        top_k: classes whose probability `predictions.csv` names, the likeliest first; all where there are
            fewer. `results/predictions.pt` has the probability of every class.
        bootstrap: resamplings of the interval of the MCC, 0 for none.

    The data module may have `classes`, the names of the classes in the order of their numbers,
    `predicted_files()`, the name of what each number in `recordings` stands for (without them the numbers are
    the names), and `draw_example(panel, split, number)`, which draws number `number` of "validation", "test"
    or "predict" into a matplotlib subfigure; without it no examples are drawn. What `relevance.png` takes of
    it stands at `ssm_modal.tasks.relevance.relevance_plot`.
    """

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: InitPart = "all",
        label_smoothing: float = 0.0,
        plots: bool = False,
        top_k: int = 5,
        time_step_scale: float = 1.0,
        recompute: Recompute = "none",
        bootstrap: int = 1000,
    ) -> None:
        super().__init__(model, overrides, optimizer, schedule, init_from, init_part, recompute)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 or more and below 1")
        if not isinstance(self.hparams["model_config"].get("n_classes"), int):
            raise ConfigError(f"model is {model!r}, expected a classifier: a model with n_classes")
        if bootstrap < 0:
            raise ValueError(f"bootstrap is {bootstrap}, expected 0 or more")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}, expected a whole number of 1 or more")
        self.time_step_scale = time_step_scale
        if time_step_scale != 1.0:
            set_time_step_scale(self.model, time_step_scale)
        self.label_smoothing, self.plots, self.top_k = label_smoothing, plots, top_k
        self.bootstrap = bootstrap
        self._confusion: Tensor | None = None
        self._seen: list[dict[str, Any]] = []  # what was decided in this validation or test, for `plots`
        self._parts: PredictionParts | None = None
        self._predicted: dict[int, dict[str, Any]] = {}  # by the number of the batch, this process's own
        self._batch_numbers: list[int] | None = None
        self._trained_classes: tuple[str, ...] = ()

    @property
    def n_classes(self) -> int:
        """Classes the model tells apart."""
        return int(self.hparams["model_config"]["n_classes"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """The data module's names, else those the checkpoint was trained with, else numbers."""
        names = tuple(getattr(self._data, "classes", ())) or self._trained_classes
        return names or tuple(str(i) for i in range(self.n_classes))

    @property
    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def check_data(self, data: Any) -> None:
        """Raise ValueError where the model has not the data's number of classes or takes another input."""
        super().check_data(data)
        if self._trainer is None or self.trainer.state.fn == "fit":
            self._check_classes(data)
            if self.time_step_scale != 1.0:
                raise ValueError(
                    f"time_step_scale is {self.time_step_scale} in training, expected 1: it is for a trained "
                    "model and data of another rate"
                )
        config = getattr(self.model, "config", None)
        check_image_input(config, data)
        given = getattr(data, "input", None)
        if not isinstance(config, SequenceClassifierConfig) or given not in ("waveform", "mu_law"):
            return
        takes = "mu_law" if config.input.type == "ids" else "waveform"
        if takes != given:
            raise ValueError(
                f"the data gives input {given!r}, but the model's input is {config.input.type!r}; set "
                f"data.init_args.input to {takes!r} or model.init_args.overrides.input"
            )
        size = getattr(config.input, "vocab_size", None)
        wanted = getattr(data, "vocab_size", None) if size is not None else None
        if isinstance(wanted, int) and isinstance(size, int) and wanted > size:
            raise ValueError(
                f"the data has a vocabulary of {wanted} ids, but the model's vocab_size is {size}; set "
                f"model.init_args.overrides.vocab_size to {wanted} or more"
            )

    def _check_classes(self, data: Any) -> None:
        names = tuple(getattr(data, "classes", ()))
        if names and len(names) != self.n_classes:
            raise ValueError(
                f"the data has {len(names)} classes ({listed(names)}), but the model's n_classes is "
                f"{self.n_classes}; set model.init_args.overrides.n_classes to {len(names)}"
            )

    # Outside training the data may lack classes; their names then come from the checkpoint, loaded by now.
    def on_validation_start(self) -> None:
        self._check_classes(self._data)

    def on_test_start(self) -> None:
        self._check_classes(self._data)

    def on_predict_start(self) -> None:
        self._check_classes(self._data)

    # ------------------------------------------------------------------ training, validation, test

    def step(self, batch: Mapping[str, Any], stage: str) -> StepOutput:
        """The summed cross-entropy of the labelled sequences; in evaluation what was right too."""
        logits, labels = self.logits(batch), batch["labels"]
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}, one a sequence"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        smoothing = self.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        known = labels != IGNORE
        count = known.sum()
        if stage == "train":
            return StepOutput(loss, count)
        predicted = wide.argmax(-1)
        self._count(labels, predicted, known, batch.get("in_training"))
        if self.plots and (stage == "test" or self.trainer.state.fn == "validate"):
            self._seen.append(decided(logits, batch))
        return StepOutput(loss, count, {"accuracy": ((predicted == labels).sum(), count)})

    def _count(self, labels: Tensor, predicted: Tensor, known: Tensor, seen: Tensor | None) -> None:
        """Add a batch to the confusion matrices (3, n_classes, n_classes) int64, a row a true class: of
        sequences that do not stand in training, that do, and of which it is not said."""
        n = self.n_classes
        if self._confusion is None:
            self._confusion = torch.zeros(3, n, n, dtype=torch.int64, device=labels.device)
        kind = torch.full_like(labels, 2) if seen is None else seen.to(labels.dtype)
        cells = (kind * n + labels) * n + predicted
        cells = torch.where(known, cells, 3 * n * n)  # the last cell: sequences without a label
        self._confusion += torch.bincount(cells, minlength=3 * n * n + 1)[: 3 * n * n].view(3, n, n)

    def _confusions(self) -> Tensor:
        n = self.n_classes
        own = self._confusion
        total = torch.zeros(3, n, n, dtype=torch.int64, device=self.device) if own is None else own.clone()
        if int(self.trainer.world_size) > 1:
            torch.distributed.all_reduce(total)
        return total.cpu()

    def confusion(self) -> Tensor:
        """The matrix of the last validation or test over all processes, (n_classes, n_classes) int64 on the
        host."""
        return self._confusions().sum(0)

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        new, seen, unknown = self._confusions()
        whole = new + seen + unknown
        if self.n_classes < 2 or not int(whole.sum()):
            return {}
        out = {"mcc": float(mcc(whole))}
        if stage == "test" and self.bootstrap:
            out["mcc_low"], out["mcc_high"] = mcc_interval(whole, self.bootstrap)
        if not int(unknown.sum()):
            count = int(new.sum())
            out["sequences_new"] = float(count)
            out["accuracy_new"] = int(new.diagonal().sum()) / count if count else math.nan
            out["mcc_new"] = float(mcc(new)) if count else math.nan
        return out

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._confusion, self._seen = None, []

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.state.fn == "validate":
            self._write_tables(self.run_dir / "validation", "validation")

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._confusion, self._seen = None, []

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._write_tables(self.run_dir, "test")

    def _write_tables(self, folder: Path, split: str) -> None:
        matrix = self.confusion()
        seen = self._gathered(self._seen) if self.plots else []
        if not self.trainer.is_global_zero:
            return
        names = self.class_names
        atomic_write(folder / "classes.csv", classes_table(matrix, names))
        atomic_write(folder / "confusion.csv", confusion_table(matrix, names))
        if self.plots:
            atomic_write(folder / "confusion.png", confusion_plot(matrix, names))
            self._draw_examples(folder, "examples.png", split, seen)

    def _draw_examples(
        self, folder: Path, name: str, split: str, found: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Draw `telling_examples` into the file `name`, and into `relevance.png` what drove the first of
        these decisions, as far as the data module can and there are any."""
        draw = getattr(self._data, "draw_example", None)
        examples = telling_examples(found, self.class_names, _EXAMPLES)
        if draw is not None and examples:
            picture = examples_plot(examples, lambda panel, number: draw(panel, split, number))
            atomic_write(folder / name, picture)
        try:
            relevance = relevance_plot(self.model, self._data, split, examples[:_EXPLAINED])
        except torch.OutOfMemoryError:
            # Gradients take more memory than the test did; what it found is written already.
            rank_zero_warn("relevance.png is not drawn: the gradients of its sequences take too much memory")
            return
        if relevance is not None:
            atomic_write(folder / "relevance.png", relevance)

    def _gathered(self, own: list[Any]) -> list[Any]:
        """The items of all processes, one process after the other."""
        if int(self.trainer.world_size) == 1:
            return own
        gathered: list[Any] = [None] * int(self.trainer.world_size)
        torch.distributed.all_gather_object(gathered, own)
        return [item for one in gathered for item in one]

    # ------------------------------------------------------------------ predictions

    def kept_batches(self, n_batches: int) -> frozenset[int]:
        """Of the `n_batches` of a prediction, this process's that an earlier, killed one has kept.

        The loader leaves them out. One is gone through in any case, since without a batch there is no
        prediction to end. Called when the weights are loaded. Nothing is kept of a prediction that
        `trainer.limit_predict_batches` cuts short.
        """
        self._parts, self._predicted = None, {}
        if self.trainer.limit_predict_batches != 1.0:
            return frozenset()
        config = sorted(self.hparams["model_config"].items())
        key = prediction_key(self, self._data, [config, self.trainer.precision, n_batches, self.class_names])
        self._parts = PredictionParts(self.run_dir / "results", key)
        own = range(int(self.trainer.global_rank), n_batches, int(self.trainer.world_size))
        done = sorted(self._parts.done() & set(own))
        if len(done) == len(own):
            done = done[:-1]
        self._predicted = {number: self._parts.load(number) for number in done}
        return frozenset(done)

    def on_predict_epoch_start(self) -> None:
        numbers = getattr(self.trainer.predict_dataloaders, "indices", None)
        self._batch_numbers = list(numbers()) if callable(numbers) else None

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`predicted` (sequences,) int64, `probabilities` (sequences, n_classes) float32 and `labels` (-100
        where not known), and `recordings` where the batch has them, on the host."""
        found = decided(self.logits(batch), batch)
        if self._batch_numbers is None:
            number = batch_idx * int(self.trainer.world_size) + int(self.trainer.global_rank)
        else:
            number = self._batch_numbers[batch_idx]
        self._predicted[number] = found
        if self._parts is not None:
            self._parts.save(number, found)
        return found

    def on_predict_epoch_end(self) -> None:
        """Write `results/predictions.csv`, in the order of the data module's numbers."""
        every = self._gathered(list(self._predicted.items()))
        batches = [found for _, found in sorted(every, key=lambda item: item[0])]
        if not self.trainer.is_global_zero:
            return
        ask = getattr(self._data, "predicted_files", None)
        files = ask() if callable(ask) else None
        results = self.run_dir / "results"
        table = predictions_table(batches, self.class_names, files, top_k=self.top_k)
        atomic_write(results / "predictions.csv", table)
        if self.plots:
            self._draw_examples(results, "predictions.png", "predict", batches)

    def predictions(self) -> list[dict[str, Any]]:
        """What `predict_step` found in this process's batches, in order, those kept earlier among them."""
        return [self._predicted[number] for number in sorted(self._predicted)]

    def forget_kept_batches(self) -> None:
        """Remove what was kept for going on: everything is written."""
        if self._parts is not None and self.trainer.is_global_zero:
            self._parts.remove()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = {"classes": list(self.class_names)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._trained_classes = tuple(checkpoint.get(_CHECKPOINT_KEY, {}).get("classes", ()))

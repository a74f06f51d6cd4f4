"""Classification: one label a sequence, with accuracy, a confusion matrix and tables of predictions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.errors import ConfigError
from ssm_modal.io.atomic import atomic_write
from ssm_modal.models import SequenceClassifierConfig
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

_CHECKPOINT_KEY = "ssm_modal_classification"


class Classification(TrainingTask):
    """Learn the label of each sequence.

    A batch has `ids` or `waveform` (batch, length), or (1, total) packed by `cu_seqlens`, and `labels`
    (sequences,) int64, the class, -100 where there is none. `recordings` (sequences,) int64 is optional: what
    number a sequence has in the data module. `in_training` (sequences,) bool is optional too: whether a
    sequence stands in training.

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

    `ssm-modal predict` writes `results/predictions.csv`: file, predicted, a probability a class, label (empty
    where it is not known). Each file is written whole or not at all.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part, recompute: see `TrainingTask`; the model
            is one that gives logits (sequences, n_classes), such as `audio_classifier`.
        label_smoothing: in training, the share of the target spread evenly over all classes, 0 to below 1.
        plots: write `confusion.png` too.
        bootstrap: resamplings of the interval of the MCC, 0 for none.

    The data module may have `classes`, the names of the classes in the order of their numbers, and
    `predicted_files()`, the name of what each number in `recordings` stands for; without them the numbers
    are the names.
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
        self.label_smoothing, self.plots, self.bootstrap = label_smoothing, plots, bootstrap
        self._confusion: Tensor | None = None
        self._predicted: list[dict[str, Any]] = []
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
        config = getattr(self.model, "config", None)
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
                f"the data has {len(names)} classes ({_some(names)}), but the model's n_classes is "
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
        self._confusion = None

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._confusion = None

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        matrix = self.confusion()
        if not self.trainer.is_global_zero:
            return
        names = self.class_names
        atomic_write(self.run_dir / "classes.csv", classes_table(matrix, names))
        atomic_write(self.run_dir / "confusion.csv", confusion_table(matrix, names))
        if self.plots:
            atomic_write(self.run_dir / "confusion.png", confusion_plot(matrix, names))

    # ------------------------------------------------------------------ predictions

    def on_predict_epoch_start(self) -> None:
        self._predicted = []

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`predicted` (sequences,) int64, `probabilities` (sequences, n_classes) and `labels` (-100 where not
        known), and `recordings` where the batch has them, on the host."""
        probabilities = self.logits(batch).double().softmax(-1).cpu()
        predicted = probabilities.argmax(-1)
        labels = batch.get("labels")
        found = {
            "predicted": predicted,
            "probabilities": probabilities.float(),
            "labels": torch.full_like(predicted, IGNORE) if labels is None else labels.cpu(),
        }
        if "recordings" in batch:
            found["recordings"] = batch["recordings"].cpu()
        self._predicted.append(found)
        return found

    def on_predict_epoch_end(self) -> None:
        """Write `results/predictions.csv`, in the order of the data module's numbers."""
        if int(self.trainer.world_size) > 1:
            gathered: list[Any] = [None] * int(self.trainer.world_size)
            torch.distributed.all_gather_object(gathered, self._predicted)
            batches = [batch for one in gathered for batch in one]
        else:
            batches = self._predicted
        if not self.trainer.is_global_zero:
            return
        ask = getattr(self._data, "predicted_files", None)
        files = ask() if callable(ask) else None
        table = predictions_table(batches, self.class_names, files)
        atomic_write(self.run_dir / "results" / "predictions.csv", table)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = {"classes": list(self.class_names)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._trained_classes = tuple(checkpoint.get(_CHECKPOINT_KEY, {}).get("classes", ()))


def mcc(matrices: Tensor) -> Tensor:
    """Matthews' correlation coefficient of confusion matrices (..., n, n) int64, a row a true class: (...)
    float64, for more than two classes Gorodkin's R_K (Comput. Biol. Chem. 28, 2004).

    0 where all sequences are of one class or predicted to be, as scikit-learn has it (torchmetrics returns
    another number there).
    """
    wide = matrices.double()
    true, predicted = wide.sum(-1), wide.sum(-2)
    total, right = true.sum(-1), wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    top = right * total - (true * predicted).sum(-1)
    bottom = (total.square() - true.square().sum(-1)) * (total.square() - predicted.square().sum(-1))
    return torch.where(bottom > 0, top / bottom.clamp(min=1).sqrt(), torch.zeros_like(top))


def mcc_interval(
    matrix: Tensor, resamplings: int, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval (percentiles) of the MCC: as many sequences drawn with replacement as there are.

    matrix: (n, n) int64. Drawing sequences is drawing cells of the matrix by their counts. seed: of the
    draws, so that the same matrix gives the same interval.
    """
    import numpy as np

    counts = matrix.flatten().double().numpy()
    drawn = np.random.default_rng(seed).multinomial(int(matrix.sum()), counts / counts.sum(), resamplings)
    values = mcc(torch.from_numpy(drawn).view(resamplings, *matrix.shape))
    tail = (1.0 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1.0 - tail]).double()).tolist()
    return low, high


def classes_table(matrix: Tensor, names: Sequence[str]) -> str:
    """CSV with the columns class, count and right. matrix: (n, n) int64, a row a true class."""
    rows = [[name, int(row.sum()), int(row[i])] for i, (name, row) in enumerate(zip(names, matrix))]
    return _csv([["class", "count", "right"], *rows])


def confusion_table(matrix: Tensor, names: Sequence[str]) -> str:
    """CSV: a row a true class, a column a predicted one. matrix: (n, n) int64."""
    rows = [[name, *row] for name, row in zip(names, matrix.tolist())]
    return _csv([["label", *names], *rows])


def predictions_table(
    batches: Sequence[Mapping[str, Tensor]], names: Sequence[str], files: Sequence[str] | None = None
) -> str:
    """CSV with the columns file, predicted, a probability a class and label, sorted by the sequence's number.

    batches: what `Classification.predict_step` returns. files: the name of each number; None: the number.
    """
    rows: list[tuple[int, list[Any]]] = []
    for batch in batches:
        numbers = batch.get("recordings")
        places = (
            range(len(rows), len(rows) + len(batch["predicted"])) if numbers is None else numbers.tolist()
        )
        for place, best, label, probabilities in zip(
            places, batch["predicted"].tolist(), batch["labels"].tolist(), batch["probabilities"].tolist()
        ):
            shown = [f"{p:.6f}" for p in probabilities]
            file = place if files is None else files[place]
            rows.append((place, [file, names[best], *shown, "" if label == IGNORE else names[label]]))
    rows.sort(key=lambda row: row[0])
    return _csv([["file", "predicted", *names, "label"], *(row for _, row in rows)])


def confusion_plot(matrix: Tensor, names: Sequence[str], *, dpi: int = 150) -> bytes:
    """A PNG of the confusion matrix: shares of each true class as shades, sequences as numbers up to 30
    classes. matrix: (n, n) int64, a row a true class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(names)
    side = min(16.0, max(4.0, 0.45 * n + 2.0))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class (%)")
    axes.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(n), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    total, right = int(matrix.sum()), int(matrix.diagonal().sum())
    axes.set_title(f"{right} of {total} right ({100 * right / max(1, total):.1f} %)", fontsize=10)
    if n <= 30:
        for i, row in enumerate(matrix.tolist()):
            for j, cell in enumerate(row):
                if cell:
                    color = "white" if share[i, j] > 50 else "black"
                    axes.text(j, i, str(cell), ha="center", va="center", color=color, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

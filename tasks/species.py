"""Classification of windows of DNA, tested by the length of the window."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.atomic import atomic_write
from ssm_modal.tasks.bootstrap import block_bootstrap
from ssm_modal.tasks.classification import Classification

WINDOW_COLUMNS = ("fold", "length", "class", "contig", "start", "block", "predicted")


class SpeciesClassification(Classification):
    """As `Classification`; a test tells the lengths of windows apart. Its data module is a
    `SpeciesDataModule`.

    Beside the tables of all windows together a test writes into the run's folder:

        windows.csv    every window: fold, length, class, contig, start (0-based), block (of the longest
                       length, the unit of resampling), predicted
        lengths.csv    length, accuracy, low, high (95 % interval, blocks resampled), windows (that do not
                       overlap, so independent but for their neighbourhood), blocks

    `pool_folds` makes one lengths.csv of the runs of all folds.
    """

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._windows: list[tuple[Tensor, Tensor]] = []

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        logits = super().logits(batch)
        if self._trainer is not None and self.trainer.testing:
            self._windows.append((batch["recordings"].cpu(), logits.argmax(-1).cpu()))
        return logits

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        found = self._gathered(self._windows)
        if not self.trainer.is_global_zero:
            return
        data = self._data
        windows, names = data.evaluation_windows("test"), self.class_names
        longest = max(window.length for window in windows)
        predicted = {
            number: int(best) for numbers, bests in found for number, best in zip(numbers.tolist(), bests)
        }
        rows = [
            [
                data.test_fold,
                window.length,
                names[window.label],
                data.genome.records[window.record].name,
                window.start,
                "-".join(map(str, window.block(longest))),
                names[predicted[number]],
            ]
            for number, window in enumerate(windows)
            if number in predicted
        ]
        atomic_write(self.run_dir / "windows.csv", _csv([WINDOW_COLUMNS, *rows]))
        atomic_write(self.run_dir / "lengths.csv", lengths_table(rows))


def lengths_table(rows: Sequence[Sequence[Any]]) -> str:
    """CSV by length of window: accuracy, its interval, and how many windows and blocks there are.

    rows: those of windows.csv, in the order of `WINDOW_COLUMNS`.
    """
    table: list[Sequence[Any]] = [("length", "accuracy", "low", "high", "windows", "blocks")]
    for length in sorted({int(row[1]) for row in rows}):
        own = [row for row in rows if int(row[1]) == length]
        names = {name: i for i, name in enumerate(dict.fromkeys((row[0], row[5]) for row in own))}
        right = torch.tensor([row[2] == row[6] for row in own])
        blocks = torch.tensor([names[row[0], row[5]] for row in own])
        low, high = block_bootstrap(right, blocks)
        accuracy = float(right.double().mean())
        table.append([length, *(f"{x:.4f}" for x in (accuracy, low, high)), len(own), len(names)])
    return _csv(table)


def pool_folds(files: Sequence[Path]) -> str:
    """The lengths table of the windows.csv of several folds together; ValueError for a fold that is there
    twice."""
    rows: list[list[str]] = []
    seen: dict[str, Path] = {}
    for file in files:
        with open(file, newline="", encoding="utf-8") as source:
            lines = list(csv.reader(source))
        if not lines or tuple(lines[0]) != WINDOW_COLUMNS:
            raise ValueError(f"{file}: is no windows.csv, expected the columns {', '.join(WINDOW_COLUMNS)}")
        for fold in {line[0] for line in lines[1:]}:
            if fold in seen:
                raise ValueError(f"{file}: fold {fold} is there twice, first in {seen[fold]}")
            seen[fold] = file
        rows += lines[1:]
    return lengths_table(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()

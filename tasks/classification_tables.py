"""What a classification decided, as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_modal.heads.chunked_loss import IGNORE
from ssm_modal.plots import Example


def classes_table(matrix: Tensor, names: Sequence[str]) -> str:
    """CSV with the columns class, count and right. matrix: (n, n) int64, a row a true class."""
    rows = [[name, int(row.sum()), int(row[i])] for i, (name, row) in enumerate(zip(names, matrix))]
    return _csv([["class", "count", "right"], *rows])


def confusion_table(matrix: Tensor, names: Sequence[str]) -> str:
    """CSV: a row a true class, a column a predicted one. matrix: (n, n) int64."""
    rows = [[name, *row] for name, row in zip(names, matrix.tolist())]
    return _csv([["label", *names], *rows])


def decided(logits: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `Classification.predict_step` returns, from `logits` (sequences, n_classes) of `batch`."""
    probabilities = logits.double().softmax(-1).cpu()
    predicted = probabilities.argmax(-1)
    labels = batch.get("labels")
    found = {
        "predicted": predicted,
        "probabilities": probabilities.float(),
        "labels": torch.full_like(predicted, IGNORE) if labels is None else labels.cpu(),
    }
    if "recordings" in batch:
        found["recordings"] = batch["recordings"].cpu()
    return found


def numbered(batches: Sequence[Mapping[str, Tensor]]) -> list[tuple[int, int, int, list[float]]]:
    """(number, predicted class, label, probabilities) of every sequence, by its number; batches: of
    `decided`. A sequence without a number has that of its place."""
    rows: list[tuple[int, int, int, list[float]]] = []
    for batch in batches:
        given, count = batch.get("recordings"), len(batch["predicted"])
        numbers = range(len(rows), len(rows) + count) if given is None else given.tolist()
        columns = (batch[name].tolist() for name in ("predicted", "labels", "probabilities"))
        rows += zip(numbers, *columns)
    return sorted(rows, key=lambda row: row[0])


def predictions_table(
    batches: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    files: Sequence[str] | None = None,
    *,
    top_k: int = 5,
) -> str:
    """CSV with the columns file, predicted, probability, then predicted_2, probability_2 and so on to the
    `top_k` likeliest classes, and label, sorted by the sequence's number.

    batches: what `Classification.predict_step` returns. files: the name of each number; None: the number.
    """
    k = min(top_k, len(names))
    ranks = [column for i in range(2, k + 1) for column in (f"predicted_{i}", f"probability_{i}")]
    table: list[list[Any]] = [["file", "predicted", "probability", *ranks, "label"]]
    for place, best, label, probabilities in numbered(batches):
        order = sorted(range(len(names)), key=lambda i: (i != best, -probabilities[i]))[:k]
        cells = [cell for i in order for cell in (names[i], f"{probabilities[i]:.6f}")]
        file = place if files is None else files[place]
        table.append([file, *cells, "" if label == IGNORE else names[label]])
    return _csv(table)


def telling_examples(
    batches: Sequence[Mapping[str, Tensor]], names: Sequence[str], most: int
) -> list[Example]:
    """Up to `most` sequences: the wrong ones by falling probability of what was said, then those that are
    right or without a label by a rising one. Batches without `recordings` give none."""
    examples = [
        Example(number, names[best], probabilities[best], None if label == IGNORE else names[label])
        for number, best, label, probabilities in numbered([b for b in batches if "recordings" in b])
    ]
    wrong = [one for one in examples if one.label not in (None, one.predicted)]
    others = [one for one in examples if one.label in (None, one.predicted)]
    wrong.sort(key=lambda one: -one.probability)
    others.sort(key=lambda one: one.probability)
    return [*wrong, *others][:most]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()

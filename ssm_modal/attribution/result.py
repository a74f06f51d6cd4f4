"""What an explanation holds, and its files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from ssm_modal.io.atomic import atomic_write

Method = Literal["gradient_x_input", "hidden_attention"]
METHODS: tuple[Method, ...] = ("gradient_x_input", "hidden_attention")


@dataclass(frozen=True)
class Attribution:
    """Relevance of input positions, on the host; fp32, fp64 of an fp64 model.

    method: how it was found. relevance: (batch, steps); of images (batch, height, width), of pixels or, by
    hidden attention, of patches.
    logits: (batch, n), the outputs that one was explained of. target: (batch,) int64, which one.
    stride: input elements a step: step i is at element i * stride.

    Of "hidden_attention" also layer: the number of the layer, from 0, or "mean" over layers; positions:
    (batch,) int64, the output step whose row it is, counted in the layer (a class token takes a step there);
    forwards, backwards: shaped as `relevance`, which is their sum: what either direction brings, None where
    there is no such direction.
    """

    method: Method
    relevance: Tensor
    logits: Tensor
    target: Tensor
    stride: int = 1
    layer: int | Literal["mean"] | None = None
    positions: Tensor | None = None
    forwards: Tensor | None = None
    backwards: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.contiguous() for name, value in named.items() if isinstance(value, Tensor)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the arrays to a safetensors file, whole or not at all; method, layer and stride are in its
        metadata."""
        about = {"method": self.method, "layer": str(self.layer), "stride": str(self.stride)}
        return atomic_write(path, save(self.tensors(), metadata=about))

    def table(self, row: int = 0, labels: Sequence[str] | None = None) -> str:
        """One batch row as CSV: position (the first input element of each step; of images row and column),
        label where `labels` name the steps, relevance, and forwards and backwards where they are there."""
        values = self.relevance[row]
        if values.ndim == 1:
            head = ["position"]
            places: list[list[int | str]] = [[i * self.stride] for i in range(values.shape[0])]
        else:
            head = ["row", "column"]
            places = [[i, j] for i in range(values.shape[0]) for j in range(values.shape[1])]
        columns = {"relevance": values}
        columns |= {
            name: part[row]
            for name, part in (("forwards", self.forwards), ("backwards", self.backwards))
            if part is not None
        }
        if labels is not None:
            if len(labels) != len(places):
                raise ValueError(f"labels has {len(labels)} entries, expected {len(places)}, one a step")
            head, places = [*head, "label"], [[*p, label] for p, label in zip(places, labels)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*head, *columns])
        numbers = zip(*(column.flatten().tolist() for column in columns.values()))
        writer.writerows([*place, *(f"{v:.9g}" for v in row)] for place, row in zip(places, numbers))
        return out.getvalue()

"""Where the steps of a model's layers stand in its input: strands, strides, patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm_modal.layers.inputs import StridedWaveformInput


class Layout:
    """How the layers of `model` see a batch of `rows`.

    A model of both strands of DNA (`model.strands`) runs on twice the rows: the sequences given, and then the
    other strands, whose steps go the other way. A model with `patch_map(values, layer, inputs)`, such as
    Vision Mamba, takes the tokens of an image in an order of each layer's own, a class token among them.

    stride: input elements a step.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.rows = inputs.shape[0]
        self._inputs = inputs
        self._strands = getattr(model, "strands", None) is not None
        self._patch_map: Callable[[Tensor, int, Tensor], Tensor] | None = getattr(model, "patch_map", None)
        front = getattr(model, "input", None)
        self.stride = front.config.stride if isinstance(front, StridedWaveformInput) else 1

    def join(self, steps: Tensor) -> Tensor:
        """(rows or twice the rows, steps) to (rows, steps): what falls on the same step of both strands is
        added."""
        if not self._doubled(steps):
            return steps
        given, other = steps.chunk(2)
        return given + other.flip(1)

    def positions(self, positions: Tensor, steps: Tensor) -> Tensor:
        """The step in `steps`, (rows or twice the rows, steps, ...), of each of `positions` (rows,)."""
        if not self._doubled(steps):
            return positions
        return torch.cat([positions, steps.shape[1] - 1 - positions])

    def place(self, steps: Tensor, layer: int) -> Tensor:
        """One number a step of `layer`, (rows or twice the rows, steps), to the input's own order: (rows,
        steps), or a grid of patches (rows, height, width)."""
        joined = self.join(steps)
        return joined if self._patch_map is None else self._patch_map(joined, layer, self._inputs)

    def _doubled(self, steps: Tensor) -> bool:
        return self._strands and steps.shape[0] == 2 * self.rows

"""What drove a few decisions of a classification, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssm_modal.attribution import attribute
from ssm_modal.plots import Example, examples_plot


def relevance_plot(model: nn.Module, data: Any, split: str, examples: Sequence[Example]) -> bytes | None:
    """A PNG of the `examples`, each with the gradient x input of the class it was taken for.

    data: a data module with `example_input(split, number)`, what the model reads of one sequence in a batch
    of one, and `draw_relevance(panel, split, number, relevance)`, which draws relevance (steps,) or (height,
    width) into a matplotlib subfigure. None where it has neither, or where there are no examples.
    """
    read, draw = getattr(data, "example_input", None), getattr(data, "draw_relevance", None)
    if read is None or draw is None or not examples:
        return None
    found: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    # Lightning evaluates in inference mode, which knows no gradients.
    with torch.inference_mode(False):
        for example in examples:
            inputs = read(split, example.number).to(device)
            found[example.number] = attribute(model, inputs).relevance[0]
    return examples_plot(
        examples, lambda panel, number: draw(panel, split, number, found[number]), columns=2, dpi=120
    )

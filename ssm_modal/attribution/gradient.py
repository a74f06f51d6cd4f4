"""Gradient x input: how much of a logit each input position accounts for, to first order.

Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation
Differences", arXiv 1605.01713. Of a logit that is linear in the input the values sum to the logit without its
bias, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_modal.attribution.layout import Layout


@dataclass(frozen=True)
class Gradients:
    """relevance: of every input position; of ids and waveforms (batch, length), of images (batch, height,
    width), of vectors (batch, length). output: what was differentiated, one number a batch row."""

    relevance: Tensor
    output: Tensor


def input_gradients(model: nn.Module, inputs: Tensor, choose: Callable[[Any], Tensor]) -> Gradients:
    """Gradient x input of one output a batch row.

    Args:
        model: called as `model(inputs)`; no row of the batch may depend on another one.
        inputs: ids (batch, length) of an integer dtype, whose embeddings are the input; of a floating dtype
            waveforms (batch, length), images (batch, channels, height, width) or vectors (batch, length, d).
        choose: what the model returned to the numbers explained, (batch,).

    Raises ValueError for ids of which the model makes no embedding, TypeError for another dtype, ValueError
    for another shape.
    """
    if inputs.dtype.is_complex or inputs.dtype == torch.bool:
        raise TypeError(f"inputs has dtype {inputs.dtype}, expected an integer or a floating one")
    if inputs.ndim not in ((2, 3, 4) if inputs.is_floating_point() else (2,)):
        raise ValueError(
            f"inputs has shape {tuple(inputs.shape)}, expected ids or a waveform (batch, length), vectors "
            "(batch, length, d) or images (batch, channels, height, width)"
        )
    with torch.enable_grad():
        if inputs.is_floating_point():
            leaf = inputs.detach().clone().requires_grad_()
            output = choose(model(leaf))
            leaves = [leaf]
        else:
            with _embeddings(model, inputs) as leaves:
                output = choose(model(inputs))
            if not leaves:
                raise ValueError(
                    f"inputs are ids, but {type(model).__name__} gave them to no nn.Embedding: there is "
                    "nothing to take the gradient by"
                )
        found = torch.autograd.grad(output.sum(), leaves)
    layout = Layout(model, inputs)
    relevance = sum(layout.join(_over_channels(leaf.detach() * grad)) for leaf, grad in zip(leaves, found))
    assert isinstance(relevance, Tensor)
    return Gradients(relevance, output.detach())


def _over_channels(product: Tensor) -> Tensor:
    if product.ndim == 2:
        return product
    return product.sum(1 if product.ndim == 4 else -1)


@contextmanager
def _embeddings(model: nn.Module, ids: Tensor) -> Iterator[list[Tensor]]:
    """While open, what embeddings make of `ids` are leaves that record gradients: the list of them."""
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        # Behind the ids themselves there may be those of the other strands.
        if not args or args[0].shape[1:] != ids.shape[1:] or not torch.equal(args[0][: len(ids)], ids):
            return None  # positions, or something else the model looks up
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handles = [m.register_forward_hook(make_leaf) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()

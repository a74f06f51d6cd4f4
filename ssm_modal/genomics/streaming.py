"""A sequence of any length through a model, in the memory of one segment or one window.

A causal model carries its state from segment to segment, which is exact. A model that needs the whole
sequence takes it whole where it has at most `window` tokens; else in windows that overlap, of which each
gives the part that is nearer to its middle than to its neighbours'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_modal.backbone import Sashimi, WaveNet
from ssm_modal.genomics.log_probs import is_causal
from ssm_modal.models.base import Model

# The ids of tokens `first` to `last` of a sequence, int64 (last - first,) on the host.
ReadIds = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class StreamConfig:
    """segment: tokens that a causal model takes at once. window, overlap: tokens of a window of a model that
    needs the whole sequence, and how many of them neighbours share."""

    segment: int = 1 << 14
    window: int = 1 << 16
    overlap: int = 1 << 13

    def __post_init__(self) -> None:
        for name in ("segment", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.overlap < self.window:
            raise ValueError(
                f"overlap is {self.overlap}, expected 0 or more and less than the window, {self.window}"
            )


class HiddenStates:
    """The vectors of a chosen layer of a language model.

    layer: None, what the head is given (after the last norm); 0, the embedding; i, the residual stream behind
    block i of the backbone. equivariant: whether the model reads both strands with the same parameters
    (Caduceus-PS); a vector then holds the channels of the strand given and those of the other one.
    mean_of_strands: the mean of these two halves, which is the same for either strand.

    Raises ValueError for a layer that the model has not, and for `mean_of_strands` of a model that is not
    equivariant, TypeError for a model that is no language model.
    """

    def __init__(self, model: Model, layer: int | None = None, *, mean_of_strands: bool = False) -> None:
        backbone: Any = model.backbone
        if isinstance(backbone, (Sashimi, WaveNet)):
            raise TypeError(f"model has a {type(backbone).__name__}, expected a stack of blocks (Backbone)")
        n = backbone.config.n_layers
        if layer is not None and not 0 <= layer <= n:
            raise ValueError(f"layer is {layer}, expected 0 (the embedding) to {n}, or none for the output")
        self.model: Any = model
        self.layer, self.mean_of_strands = layer, mean_of_strands
        self.causal = is_causal(model)
        self.equivariant = getattr(model, "strands", None) is not None
        if mean_of_strands and not self.equivariant:
            raise ValueError(
                f"mean_of_strands is True, but a {type(model).__name__} has vectors of one strand"
            )
        self.device = next(model.parameters()).device

    def __call__(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """ids: (batch, length) int64. Returns vectors (batch, length, width) and the model's new state."""
        vectors, state = self._vectors(ids, state)
        if self.mean_of_strands:
            given, other = vectors.chunk(2, dim=-1)
            vectors = (given + other) / 2
        return vectors, state

    def _vectors(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.layer is None:
            return self.model.hidden(ids, state)
        kept: list[Tensor] = []

        def keep_input(module: Any, args: tuple[Any, ...]) -> None:
            kept.append(args[0])

        def keep_output(module: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            branch, residual = output[0], output[1]
            kept.append(branch if residual is None else branch.to(residual.dtype) + residual)

        blocks = self.model.backbone.layers
        if self.layer == 0:
            hook = blocks[0].register_forward_pre_hook(keep_input)
        else:
            hook = blocks[self.layer - 1].register_forward_hook(keep_output)
        try:
            _, state = self.model.hidden(ids, state)
        finally:
            hook.remove()
        # The blocks of an equivariant model see the strands as rows of one batch.
        return self.model.strands.join(kept[0]) if self.equivariant else kept[0], state

    @torch.inference_mode()
    def width(self) -> int:
        """Channels of a vector."""
        return int(self(torch.zeros(1, 2, dtype=torch.int64, device=self.device))[0].shape[-1])

    @torch.inference_mode()
    def stream(self, read: ReadIds, tokens: int, config: StreamConfig) -> Iterator[tuple[int, Tensor]]:
        """(first token, vectors (n, width) on the device) of pieces that cover `tokens` tokens, each once and
        in order."""
        if self.causal:
            state = None
            for first in range(0, tokens, config.segment):
                ids = read(first, min(first + config.segment, tokens))
                hidden, state = self(ids[None].to(self.device), state)
                yield first, hidden[0]
            return
        for begin, end, first, last in windows(tokens, config.window, config.overlap):
            hidden, _ = self(read(begin, end)[None].to(self.device))
            yield first, hidden[0, first - begin : last - begin]


def windows(tokens: int, window: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """(begin, end, first, last) of windows over `tokens`: what is read, and the part of it that counts.

    The parts cover everything once. Windows are of one length, the last moved back to end with the sequence.
    """
    if tokens <= window:
        if tokens:
            yield 0, tokens, 0, tokens
        return
    step = window - overlap
    begins = [*range(0, tokens - window, step), tokens - window]
    first = 0
    for i, begin in enumerate(begins):
        end = begin + window
        last = tokens if i + 1 == len(begins) else (begins[i + 1] + end) // 2
        yield begin, end, first, last
        first = last

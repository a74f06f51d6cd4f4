"""Hidden-attention rows of any layer that mixes along the length: chunks joined, channels taken together.

Ali, Zimerman, Wolf, "The Hidden Attention of Mamba Models", arXiv 2403.01590. A selective layer's output at
position t is, channel by channel, sum_s alpha_{t,s} times the scan's input at s. What the row of t holds:

    Mamba       the paper's alpha, of each of d_inner channels. As there, neither the convolution before the
                scan nor the skip D nor the gate z is in it.
    S4D         the convolution kernel K_{t - s}, the same for every input.
    attention   the softmax weights, of each head.
    both ways   one row a direction, each with the step t itself; halved where the layer takes the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.layers.bidirectional import Bidirectional
from ssm_modal.layers.mixer import ROW_CHUNK, Mixer

Channels = Literal["abs", "mean", "each"]
CHANNELS: tuple[Channels, ...] = ("abs", "mean", "each")


@dataclass(frozen=True)
class AttentionRow:
    """What one output position of a layer takes from every step.

    forwards: from a run from the first step to the last, backwards: from one the other way; None where the
    layer has no such run. (batch, length), or (batch, length, channels) with channels "each"; zero at steps
    that are not seen.
    """

    forwards: Tensor | None
    backwards: Tensor | None

    @property
    def total(self) -> Tensor:
        """Both directions together."""
        if self.forwards is None or self.backwards is None:
            one = self.forwards if self.forwards is not None else self.backwards
            assert one is not None  # every layer runs one way at least
            return one
        return self.forwards + self.backwards


def hidden_attention_row(
    layer: nn.Module,
    x: Tensor,
    position: int,
    *,
    channels: Channels = "abs",
    reverse: bool = False,
    chunk_size: int = ROW_CHUNK,
) -> AttentionRow:
    """The row of `position` of one layer's hidden attention, by scans: no length x length matrix is made.

    Args:
        layer: a `Mixer` (Mamba, S4D, Attention) or a `Bidirectional`.
        x: (batch, length, d_model), the layer's input.
        position: the output step, 0 to length - 1.
        channels: "abs", the mean of |alpha| over channels (or heads); "mean", that of alpha, as the paper's
            code has it, where channels of opposite signs cancel; "each", no mean.
        reverse: of a `Mixer`: the row of a run from the last step to the first.
        chunk_size: steps worked on at a time. Memory is that of a chunk beside the row; the row is the same.

    Returns:
        fp32, fp64 for fp64 inputs; no gradients are recorded.

    Raises:
        TypeError: a layer without attention rows. ValueError: a position or an option that is not allowed.
    """
    if channels not in CHANNELS:
        raise ValueError(f"channels is {channels!r}, expected one of {', '.join(CHANNELS)}")
    if isinstance(layer, Bidirectional):
        if reverse:
            raise ValueError("reverse is for a layer of one direction; a Bidirectional gives both rows")
        share = 0.5 if layer.config.combine == "mean" else 1.0
        one, other = (_row(layer, x, position, channels, way, chunk_size) for way in (False, True))
        return AttentionRow(share * one, share * other)
    if not isinstance(layer, Mixer):
        raise TypeError(f"layer is a {type(layer).__name__}, expected a Mixer or a Bidirectional")
    row = _row(layer, x, position, channels, reverse, chunk_size)
    return AttentionRow(None, row) if reverse else AttentionRow(row, None)


def mixing_layers(model: nn.Module) -> tuple[Mixer | Bidirectional, ...]:
    """The layers of `model` that mix along the length, in the order of its modules; what stands inside a
    `Bidirectional` is not counted on its own."""
    found: list[Mixer | Bidirectional] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, (Mixer, Bidirectional)):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return tuple(found)


@torch.no_grad()
def _row(
    layer: Mixer | Bidirectional, x: Tensor, position: int, channels: Channels, reverse: bool, chunk_size: int
) -> Tensor:
    row: Tensor | None = None
    for start, part in layer.attention_row(x, position, reverse=reverse, chunk_size=chunk_size):
        if channels == "abs":
            part = part.abs().mean(-1)
        elif channels == "mean":
            part = part.mean(-1)
        if row is None:
            row = part.new_zeros(x.shape[0], x.shape[1], *part.shape[2:])
        row[:, start : start + part.shape[1]] = part
    assert row is not None  # the chunk with the position is always there
    return row.to(state_dtype(x.dtype))

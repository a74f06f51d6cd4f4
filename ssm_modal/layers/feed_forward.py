"""What may stand behind a mixer in a block: a layer that works on each position alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ssm_modal.layers.config import Config


@dataclass(frozen=True)
class FeedForwardConfig(Config):
    """Base of the feed-forward layers' configs."""

    def build(self, d_model: int) -> FeedForward:
        """The layer this config describes, for inputs of width `d_model`."""
        raise NotImplementedError(f"{type(self).__name__} describes no layer")


class FeedForward(nn.Module, ABC):
    """(..., d_model) to the same, each position on its own."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_model)."""

    @abstractmethod
    def residual_weights(self) -> Iterator[Tensor]:
        """The weights whose product leaves the layer."""

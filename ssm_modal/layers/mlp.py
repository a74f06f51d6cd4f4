"""The position-wise feed-forward layer: SwiGLU (Shazeer, arXiv 2002.05202) or GELU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.layers.config import check_positive
from ssm_modal.layers.feed_forward import FeedForward, FeedForwardConfig


@dataclass(frozen=True)
class MLPConfig(FeedForwardConfig):
    """activation: "swiglu" (three matrices) or "gelu" (two). d_hidden: None takes 4 d_model for gelu and 8/3
    d_model, rounded up to a multiple of 16, for swiglu, so that both have about 8 d_model^2 parameters."""

    type: ClassVar[str] = "mlp"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    d_hidden: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("MLPConfig", d_hidden=self.d_hidden)

    def hidden(self, d_model: int) -> int:
        """The hidden width for inputs of width `d_model`."""
        if self.d_hidden is not None:
            return self.d_hidden
        return 4 * d_model if self.activation == "gelu" else swiglu_width(d_model)

    def build(self, d_model: int) -> MLP:
        return MLP(d_model, self)


def swiglu_width(d_model: int) -> int:
    """The hidden width of SwiGLU with about 8 d_model^2 parameters: 8/3 d_model, up to a multiple of 16."""
    return -(-(8 * d_model) // 48) * 16


class MLP(FeedForward):
    """(..., d_model) to the same.

    "swiglu" is out_proj(silu(gate_proj(x)) * up_proj(x)), "gelu" is out_proj(gelu(up_proj(x))).
    """

    def __init__(self, d_model: int, config: MLPConfig) -> None:
        super().__init__()
        d_hidden = config.hidden(d_model)
        self.config = config
        self.gate_proj = (
            nn.Linear(d_model, d_hidden, bias=config.bias) if config.activation == "swiglu" else None
        )
        self.up_proj = nn.Linear(d_model, d_hidden, bias=config.bias)
        self.out_proj = nn.Linear(d_hidden, d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        if self.gate_proj is None:
            return self.out_proj(F.gelu(hidden))
        return self.out_proj(F.silu(self.gate_proj(x)) * hidden)

    def residual_weights(self) -> Iterator[Tensor]:
        yield self.out_proj.weight

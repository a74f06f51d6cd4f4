"""What every backbone is to the models that rest on it: vectors in, vectors out, and a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import Config
from ssm_modal.state import State


@dataclass(frozen=True)
class BackboneBaseConfig(Config):
    """Base of the backbones' configs. d_model: the width of what goes in and comes out."""

    d_model: int

    def build(self) -> BackboneBase:
        """The backbone this config describes, freshly initialised."""
        raise NotImplementedError(f"{type(self).__name__} describes no backbone")

    def sees_the_future(self) -> str | None:
        """Which field lets a step see later ones, in words; None for a causal backbone."""
        return None

    @property
    def aux_loss_coef(self) -> float:
        """How much of the load-balancing loss training adds; 0 without a mixture of experts."""
        return 0.0

    @property
    def causal(self) -> bool:
        """Whether no layer sees the future."""
        return self.sees_the_future() is None


class BackboneBase(nn.Module, ABC):
    """(batch, length, d_model) to the same, knowing no modality.

    Attributes: has_state, False where the whole sequence is needed; steps_alike, False where what a step runs
    depends on how many came before it, so that no CUDA graph can stand for all of them;
    gradient_checkpointing, a switch that may be set at any time: in training keep the inputs of blocks alone
    and compute the rest again.
    """

    config: BackboneBaseConfig
    d_model: int
    has_state: bool = True
    steps_alike: bool = True
    gradient_checkpointing: bool
    state_type: type[State]

    @abstractmethod
    def forward(
        self, x: Tensor, state: Any = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Run over x: (batch, length, d_model).

        state: what an earlier call returned, or None; it is left untouched. seqs: `Sequences`, or cu_seqlens
        (sequences + 1,) int32 or int64, which is validated here once: x is then (1, total, d_model) and the
        state has one row a sequence. Returns (output in x's shape, new state), the state None where a layer
        needs the whole sequence.
        """

    @abstractmethod
    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first step for `batch` rows; device and dtype default to the parameters'."""

    @abstractmethod
    def step_(self, x: Tensor, state: Any) -> Tensor:
        """One step, x: (batch, 1, d_model) to the same; `state` is changed in place, without gradients."""

"""Two directions over one sequence, each a native scan: nothing is flipped or copied.

Directions may own all their parameters, share their projections (Caduceus, arXiv 2403.03234; Vision Mamba,
arXiv 2401.09417) or share everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssm_modal.errors import StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import Config
from ssm_modal.layers.mixer import ROW_CHUNK, MixerConfig, build_mixer, check_input, check_state
from ssm_modal.state import State


@dataclass(frozen=True)
class BidirectionalConfig(Config):
    """combine: "sum", "mean", or "concat", which a Linear brings back to d_model.

    share: "none", two whole mixers; "projections", one pair of projections around two mixes (the convolution,
    the scan and what selects them are each direction's own); "all", one mixer run both ways.
    """

    type: ClassVar[str] = "bidirectional"
    combine: Literal["sum", "mean", "concat"] = "sum"
    share: Literal["none", "projections", "all"] = "none"


class Bidirectional(nn.Module):
    """A mixer run from the first step to the last and back: (batch, length, d_model) to the same.

    With share "none" the two outputs are combined; where projections are shared, sum and mean combine before
    `project_out`, which then runs once. Needs the whole sequence: given a state it raises StateError, and the
    state it returns is None.
    """

    has_state = False

    def __init__(self, d_model: int, mixer: MixerConfig, config: BidirectionalConfig) -> None:
        super().__init__()
        self.d_model = d_model
        self.config = config
        self.forwards = build_mixer(mixer, d_model)
        self.backwards = None if config.share == "all" else build_mixer(mixer, d_model)
        if self.backwards is not None and config.share == "projections":
            self.backwards.drop_projections()
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False) if config.combine == "concat" else None

    def forward(
        self, x: Tensor, state: State | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, None]:
        """x: (batch, length, d_model), or (1, total, d_model) packed by `seqs`. Returns (output, None)."""
        check_input(self, x, seqs)
        check_state(self, state, x, seqs)
        first = self.forwards
        second = self.backwards if self.backwards is not None else first
        projected = first.project_in(x)
        if self.config.share != "none" and self.out_proj is None:
            return first.project_out(self._mean(first.mix_both(second, projected, seqs=seqs))), None
        own = projected if self.config.share != "none" else second.project_in(x)
        y, _ = first.mix(projected, seqs=seqs, return_state=False)
        w, _ = second.mix(own, seqs=seqs, reverse=True, return_state=False)
        last = second if self.config.share == "none" else first
        if self.out_proj is not None:
            return self.out_proj(torch.cat([first.project_out(y), last.project_out(w)], dim=-1)), None
        return self._mean(first.project_out(y) + last.project_out(w)), None

    def _mean(self, total: Tensor) -> Tensor:
        return total / 2 if self.config.combine == "mean" else total

    def attention_row(
        self, x: Tensor, position: int, *, reverse: bool = False, chunk_size: int = ROW_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        """The row of one direction, of its own mixer: from the first step on, or in `reverse` from the last.

        Both rows hold the step at `position` itself, as both mixes do. See `Mixer.attention_row`.
        """
        mixer = self.backwards if reverse and self.backwards is not None else self.forwards
        shared = self.forwards if self.config.share == "projections" else mixer
        yield from mixer.attention_row(
            x, position, reverse=reverse, chunk_size=chunk_size, project_in=shared.project_in
        )

    def residual_weights(self) -> Iterator[Tensor]:
        """The weights of the Linears whose output leaves the layer."""
        if self.out_proj is not None:
            yield self.out_proj.weight
            return
        yield from self.forwards.residual_weights()
        if self.backwards is not None and self.config.share == "none":
            yield from self.backwards.residual_weights()

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        raise StateError("Bidirectional: needs the whole sequence and has no state")

    def step_(self, x: Tensor, state: State) -> Tensor:
        raise StateError("Bidirectional: needs the whole sequence and cannot step")

"""The protocol of everything that mixes information along the length axis.

A mixer works in three parts, `project_in`, `mix` and `project_out`, so that a bidirectional layer can run two
mixes under one pair of projections. `forward` joins them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_modal.errors import StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import Config
from ssm_modal.state import State

ROW_CHUNK = 32768  # steps of a chunk of an attention row: its memory, where the sequence is longer


@dataclass(frozen=True)
class MixerConfig(Config):
    """Base of the mixers' configs."""

    def build(self, d_model: int) -> Mixer:
        """The layer this config describes, for inputs of width `d_model`."""
        raise NotImplementedError(f"{type(self).__name__} describes no layer")


class Mixer(nn.Module, ABC):
    """Maps (batch, length, d_model) to the same, carrying a `State`.

    Attributes: d_model, the width of input and output; d_inner, the width of what `mix` returns; has_state,
    False for a layer that needs the whole sequence.
    """

    d_model: int
    d_inner: int
    has_state: bool = True

    @abstractmethod
    def project_in(self, x: Tensor) -> Any:
        """(batch, length, d_model) to what `mix` takes; works on each position alone."""

    @abstractmethod
    def mix(
        self,
        projected: Any,
        state: Any = None,
        *,
        seqs: Sequences | None = None,
        reverse: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, Any]:
        """Mix along the length: (batch, length, d_inner) and the new state, None unless `return_state`."""

    def mix_both(self, other: Any, projected: Any, *, seqs: Sequences | None = None) -> Tensor:
        """`mix` plus that of `other`, of the same class and config, in reverse: (batch, length, d_inner).

        A mixer whose op takes both directions at once overrides it.
        """
        y, _ = self.mix(projected, seqs=seqs, return_state=False)
        w, _ = other.mix(projected, seqs=seqs, reverse=True, return_state=False)
        return y + w

    @abstractmethod
    def project_out(self, y: Tensor) -> Tensor:
        """(batch, length, d_inner) to (batch, length, d_model); works on each position alone."""

    @abstractmethod
    def drop_projections(self) -> None:
        """Remove the parameters of `project_in` and `project_out`; only `mix` can be called afterwards."""

    def residual_weights(self) -> Iterator[Tensor]:
        """The weights of the Linears whose output leaves the layer."""
        out_proj = self.out_proj
        assert isinstance(out_proj, nn.Linear)
        yield out_proj.weight

    @abstractmethod
    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step, for `batch` rows; device and dtype default to the parameters'."""

    @abstractmethod
    def step_(self, x: Tensor, state: Any) -> Tensor:
        """One step, x: (batch, 1, d_model) to the same; changes `state` in place and records no gradients."""

    def attention_row(
        self,
        x: Tensor,
        position: int,
        *,
        reverse: bool = False,
        chunk_size: int = ROW_CHUNK,
        project_in: Callable[[Tensor], Any] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """What the output at `position` takes from each step: a row of the layer's attention matrix.

        x: (batch, length, d_model), the layer's input. reverse: the row of a run from the last step to the
        first. project_in: used in the place of the layer's own (a bidirectional layer may share it).

        Yields (start, row (batch, steps, channels)) chunk by chunk, from the position outward; steps that the
        output does not see are in no chunk. fp32, fp64 for fp64 inputs; no gradients are recorded. What a
        channel is and what the row leaves out stands at each layer.

        Raises NotImplementedError for a layer without such rows, ValueError for a position outside.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention row")

    def forward(
        self, x: Tensor, state: Any = None, *, seqs: Sequences | None = None, reverse: bool = False
    ) -> tuple[Tensor, Any]:
        """Run over x: (batch, length, d_model), or (1, total, d_model) packed by `seqs`.

        state: what an earlier call returned, or None for the zero state; it is left untouched. reverse: run
        from the last step to the first (of each sequence); the state then enters at the last step.
        Returns (output of x's shape, new state).
        """
        check_input(self, x, seqs)
        check_state(self, state, x, seqs)
        y, state = self.mix(self.project_in(x), state, seqs=seqs, reverse=reverse)
        return self.project_out(y), state


def build_mixer(config: MixerConfig, d_model: int) -> Mixer:
    """The mixer that `config` describes, for inputs of width `d_model`."""
    if not isinstance(config, MixerConfig):
        raise TypeError(f"config must be a MixerConfig, got {type(config).__name__}")
    return config.build(d_model)


def check_input(layer: Any, x: object, seqs: object = None) -> None:
    """Raise unless x is (batch, length, d_model), with `seqs` of batch 1 and of their length."""
    name = type(layer).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.ndim != 3 or x.shape[-1] != layer.d_model:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (batch, length, {layer.d_model})")
    if seqs is None:
        return
    if not isinstance(seqs, Sequences):
        raise TypeError(
            f"{name}: seqs must be Sequences (Sequences.from_cu_seqlens), got {type(seqs).__name__}"
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"{name}: x has batch {x.shape[0]}, expected 1 where seqs packs the sequences end to end"
        )
    if seqs.total != x.shape[1]:
        raise ValueError(f"{name}: seqs covers {seqs.total} steps, expected {x.shape[1]}, the length of x")


def check_state(layer: Any, state: object, x: Tensor, seqs: Sequences | None = None) -> None:
    """Raise StateError unless `state` is None or this layer's, with one row a batch entry (or sequence)."""
    if state is None:
        return
    name = type(layer).__name__
    if not layer.has_state:
        raise StateError(
            f"{name}: was given a state, but needs the whole sequence and has none; pass state=None"
        )
    expected = getattr(layer, "state_type", State)
    if not isinstance(state, expected):
        raise StateError(f"{name}: state is a {type(state).__name__}, expected {expected.__name__}")
    rows = seqs.n if seqs is not None else x.shape[0]
    if state.batch_size != rows:
        what = "one a sequence" if seqs is not None else "one a batch entry"
        raise StateError(f"{name}: state has {state.batch_size} rows, expected {rows}, {what}")


def outward(position: int, length: int, reverse: bool, chunk_size: int) -> Iterator[tuple[int, int]]:
    """The steps that `position` sees in chunks [start, end), the one with the position first.

    Raises ValueError for a position outside 0 to length - 1 or a chunk_size below 1.
    """
    if not 0 <= position < length:
        raise ValueError(f"position is {position}, expected 0 to {length - 1}, the steps of the layer")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    if reverse:
        for start in range(position, length, chunk_size):
            yield start, min(start + chunk_size, length)
    else:
        for end in range(position + 1, 0, -chunk_size):
            yield max(end - chunk_size, 0), end

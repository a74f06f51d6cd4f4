"""The sequence classifier: an input layer, the backbone and a pooled head, for ids or waveforms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ssm_modal.backbone import BackboneBaseConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.heads.classification import ClassificationHead, Pooling, PoolingState
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import InputConfig, StridedState, StridedWaveformConfig
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.state import State


@dataclass(frozen=True)
class SequenceClassifierConfig(ModelConfig):
    """n_classes classes. input: `IdsConfig`, `WaveformConfig` or `StridedWaveformConfig`.

    pooling: over the steps of each sequence: "mean", "max", or "last" for a causal model, whose last step
    alone has seen all others. head_dropout: on the pooled vector. The model is causal unless
    `backbone.bidirectional` is set or a mixer has causal=False.
    """

    type: ClassVar[str] = "sequence_classifier"
    n_classes: int
    backbone: BackboneBaseConfig
    input: InputConfig = field(default_factory=StridedWaveformConfig)
    pooling: Pooling = "mean"
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "SequenceClassifierConfig"
        check_positive(name, n_classes=self.n_classes)
        if not 0 <= self.head_dropout < 1:
            raise ConfigError(f"{name}: head_dropout is {self.head_dropout}, expected 0 or more and below 1")
        if self.pooling == "last" and not self.causal:
            raise ConfigError(
                f"{name}: pooling is 'last' with a backbone that is not causal, expected 'mean' or 'max'"
            )

    @property
    def causal(self) -> bool:
        """Whether no layer sees the future."""
        return self.backbone.sees_the_future() is None

    @property
    def backbone_config(self) -> BackboneBaseConfig:
        return self.backbone

    def build(self) -> SequenceClassifier:
        return SequenceClassifier(self)


@dataclass(frozen=True)
class ClassifierState(State):
    """What a causal classifier carries along a stream: the input layer's leftover samples (None where it has
    none), the backbone's state and what has been pooled."""

    front: StridedState | None
    backbone: State
    pooled: PoolingState


class SequenceClassifier(Model):
    """Sequences to logits (sequences, n_classes).

    Packed sequences give what they give one by one. A causal model carries a `ClassifierState`: chunks of any
    size in turn give, after the last, the logits of the whole.
    """

    config: SequenceClassifierConfig

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.backbone.d_model
        self.input = config.input.build(d_model)
        self.backbone = config.backbone.build()
        self.head = ClassificationHead(d_model, config.n_classes, config.pooling, config.head_dropout)

    def forward(
        self,
        x: Tensor,
        state: ClassifierState | None = None,
        *,
        seqs: Sequences | Tensor | None = None,
    ) -> tuple[Tensor, ClassifierState | None]:
        """x: (batch, length), ids int64 or int32 or a waveform of a floating dtype, as `config.input` says;
        or (1, total) packed by `seqs`, a `Sequences` or cu_seqlens (sequences + 1,). state: what an earlier
        call returned, or None; it is left untouched.

        Returns (logits (batch or sequences, n_classes) of everything seen so far, new state; None where a
        layer needs the whole sequence).

        Raises TypeError or ValueError for an input of a wrong dtype or shape or ids outside the vocabulary,
        and StateError for a state that does not fit or given to a model that has none.
        """
        seqs = self._check(x, state, seqs)
        vectors, steps, front = self.input(x, None if state is None else state.front, seqs=seqs)
        before = None if state is None else state.backbone
        if vectors.shape[1] == 0 and self.backbone.has_state:
            # A chunk that completes no vector, or nothing at all: every state stays.
            rows = steps.n if steps is not None else vectors.shape[0]
            after: State | None = before or self.backbone.init_state(rows, device=x.device)
            hidden = vectors
        else:
            hidden, after = self.backbone(vectors, before, seqs=steps)
        pooled = self.head.pool(hidden, None if state is None else state.pooled, seqs=steps)
        logits = self.head.logits(pooled)
        return logits, None if after is None else ClassifierState(front, after, pooled)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ClassifierState:
        """The state before the first sample for `batch` rows; device and dtype default to the parameters'.

        Raises StateError where a layer needs the whole sequence.
        """
        return ClassifierState(
            self.input.init_state(batch, device=device, dtype=dtype),
            self.backbone.init_state(batch, device=device, dtype=dtype),
            self.head.init_state(batch, device=device, dtype=dtype),
        )

    def _check(self, x: object, state: object, seqs: Sequences | Tensor | None) -> Sequences | None:
        name = "SequenceClassifier"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
        if x.ndim != 2:
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (batch, length)")
        if seqs is not None:
            if x.shape[0] != 1:
                raise ValueError(f"{name}: x has batch {x.shape[0]}, expected 1 with seqs")
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
        if state is None:
            return seqs
        if not self.backbone.has_state:
            raise StateError(f"{name}: was given a state, but a layer needs the whole sequence and has none")
        if not isinstance(state, ClassifierState):
            raise StateError(f"{name}: state is a {type(state).__name__}, expected ClassifierState")
        if (state.front is None) != (self.input.state_type is None):
            kind = type(self.config.input).__name__
            raise StateError(f"{name}: the state is of another kind of input than {kind}")
        rows = seqs.n if seqs is not None else x.shape[0]
        if state.pooled.batch_size != rows:
            raise StateError(f"{name}: state has {state.pooled.batch_size} rows, expected {rows}")
        return seqs

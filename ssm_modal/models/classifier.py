"""The sequence classifier: an input layer, the backbone and a pooled head, for ids, waveforms or vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssm_modal.backbone import BackboneBaseConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.heads.classification import ClassificationHead, Pooling, PoolingState
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import IdsConfig, IdsInput, InputConfig, StridedState, StridedWaveformConfig
from ssm_modal.layers.reverse_complement import Strands, StrandsConfig
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.state import State


@dataclass(frozen=True)
class SequenceClassifierConfig(ModelConfig):
    """n_classes classes. input: `IdsConfig`, `WaveformConfig`, `StridedWaveformConfig` or
    `VectorsConfig`.

    pooling: over the steps of each sequence: "mean", "max", or "last" for a causal model, whose last step
    alone has seen all others. head_dropout: on the pooled vector. The model is causal unless
    `backbone.bidirectional` is set or a mixer has causal=False.

    strands: for ids of DNA, None or the tokenizer whose reverse complements are read too; backbone.d_model is
    the width of one strand. strand_use says how (Caduceus, arXiv 2403.03234):

        "shared"      both strands, always, through the same parameters; the logits are the mean of theirs,
                      the same whichever strand is given (Caduceus-PS)
        "aware"       both strands likewise, but their pooled vectors stand side by side under a head of
                      2 d_model channels, which can tell the given strand from the other
        "evaluation"  training reads the strand given (its data draws one or the other), evaluation (`eval()`)
                      takes the mean of the logits of both (Caduceus-Ph)

    A model that reads both strands needs whole sequences and carries no state.
    """

    type: ClassVar[str] = "sequence_classifier"
    n_classes: int
    backbone: BackboneBaseConfig
    input: InputConfig = field(default_factory=StridedWaveformConfig)
    pooling: Pooling = "mean"
    head_dropout: float = 0.0
    strands: StrandsConfig | None = None
    strand_use: Literal["shared", "aware", "evaluation"] = "shared"

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
        if self.strands is not None and not isinstance(self.input, IdsConfig):
            raise ConfigError(f"{name}: strands is set, but the input is {self.input.type!r}, not ids")

    @property
    def causal(self) -> bool:
        """Whether no layer sees the future."""
        return self.backbone.causal

    @property
    def backbone_config(self) -> BackboneBaseConfig:
        return self.backbone

    def build(self) -> SequenceClassifier:
        """Raises ConfigError for a causal backbone under an input layer that needs whole sequences."""
        whole = self.input.needs_whole
        if whole is not None and self.causal:
            raise ConfigError(
                f"SequenceClassifierConfig: input.{whole} is set with a causal backbone, but it needs the "
                "whole sequence, of which a chunk knows neither its place nor the rest; expected it unset or "
                "a bidirectional one"
            )
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
        self.strands = None
        if config.strands is not None and isinstance(config.input, IdsConfig):
            self.strands = Strands(config.strands, config.input.vocab_size)
        self._aware = self.strands is not None and config.strand_use == "aware"
        width = 2 * d_model if self._aware else d_model
        self.head = ClassificationHead(width, config.n_classes, config.pooling, config.head_dropout)
        self.has_state = self.backbone.has_state and self.strands is None

    @property
    def token_embedding(self) -> nn.Embedding | None:
        return self.input.embedding if isinstance(self.input, IdsInput) else None

    def forward(
        self,
        x: Tensor,
        state: ClassifierState | None = None,
        *,
        seqs: Sequences | Tensor | None = None,
    ) -> tuple[Tensor, ClassifierState | None]:
        """x: (batch, length), ids int64 or int32 or a waveform of a floating dtype, or (batch, length,
        channels) vectors, as `config.input` says; or (1, total[, channels]) packed by `seqs`, a `Sequences`
        or cu_seqlens (sequences + 1,). state: what an earlier call returned, or None; it is left untouched.

        Returns (logits (batch or sequences, n_classes) of everything seen so far, new state; None where a
        layer needs the whole sequence).

        Raises TypeError or ValueError for an input of a wrong dtype or shape or ids outside the vocabulary,
        and StateError for a state that does not fit or given to a model that has none.
        """
        seqs = self._check(x, state, seqs)
        if self.strands is not None and not (self.training and self.config.strand_use == "evaluation"):
            return self._of_both_strands(self.strands, x, seqs), None
        pooled, new = self._pool(x, state, seqs)
        return self.head.logits(pooled), new

    def features(self, x: Tensor, *, seqs: Sequences | Tensor | None = None) -> Tensor:
        """What the head sees of each sequence, (batch or sequences, d_model); arguments as `forward`'s.

        Raises ValueError for a model of both strands, whose head sees two vectors a sequence.
        """
        if self.strands is not None:
            raise ValueError(
                "SequenceClassifier: features of a model with strands are not one vector a sequence"
            )
        return self.head.vectors(self._pool(x, None, self._check(x, None, seqs))[0])

    def _pool(
        self, x: Tensor, state: ClassifierState | None, seqs: Sequences | None
    ) -> tuple[PoolingState, ClassifierState | None]:
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
        if after is None or not self.has_state:
            return pooled, None
        return pooled, ClassifierState(front, after, pooled)

    def _of_both_strands(self, strands: Strands, x: Tensor, seqs: Sequences | None) -> Tensor:
        rows, packed = strands.both(x, seqs)
        vectors, _, _ = self.input(rows, seqs=packed)
        hidden, _ = self.backbone(vectors, seqs=packed)
        pooled = self.head.pool(hidden, seqs=packed)
        if self._aware:
            given, other = pooled.total.chunk(2)
            side_by_side = torch.cat([given, other], dim=-1)
            return self.head.logits(PoolingState(side_by_side, pooled.count[: len(given)]))
        given, other = self.head.logits(pooled).chunk(2)
        return (given + other) / 2

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ClassifierState:
        """The state before the first sample for `batch` rows; device and dtype default to the parameters'.

        Raises StateError where a layer, or the other strand, needs the whole sequence.
        """
        if not self.has_state:
            raise StateError("SequenceClassifier: needs the whole sequence, so it has no state")
        return ClassifierState(
            self.input.init_state(batch, device=device, dtype=dtype),
            self.backbone.init_state(batch, device=device, dtype=dtype),
            self.head.init_state(batch, device=device, dtype=dtype),
        )

    def _check(self, x: object, state: object, seqs: Sequences | Tensor | None) -> Sequences | None:
        name = "SequenceClassifier"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
        channels = self.input.channels
        fits = x.ndim == 2 if channels is None else x.ndim == 3 and x.shape[2] == channels
        if not fits:
            expected = "(batch, length)" if channels is None else f"(batch, length, {channels})"
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected {expected}")
        if seqs is not None:
            if x.shape[0] != 1:
                raise ValueError(f"{name}: x has batch {x.shape[0]}, expected 1 with seqs")
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
        if state is None:
            return seqs
        if not self.has_state:
            raise StateError(f"{name}: was given a state, but needs the whole sequence and has none")
        if not isinstance(state, ClassifierState):
            raise StateError(f"{name}: state is a {type(state).__name__}, expected ClassifierState")
        if (state.front is None) != (self.input.state_type is None):
            kind = type(self.config.input).__name__
            raise StateError(f"{name}: the state is of another kind of input than {kind}")
        rows = seqs.n if seqs is not None else x.shape[0]
        if state.pooled.batch_size != rows:
            raise StateError(f"{name}: state has {state.pooled.batch_size} rows, expected {rows}")
        return seqs

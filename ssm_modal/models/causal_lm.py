"""The causal language model: token embedding, backbone, language head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssm_modal.backbone import BackboneBaseConfig, BackboneConfig
from ssm_modal.errors import ConfigError
from ssm_modal.heads.language import LanguageHead
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import check_ids
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.state import State


@dataclass(frozen=True)
class CausalLMConfig(ModelConfig):
    """vocab_size ids, 0 to vocab_size - 1. tie_embeddings: the head uses the embedding's weight.
    pad_vocab_multiple: rows of the embedding are rounded up to a multiple of it (matrix units like 8 or 64);
    ids stay below vocab_size. embedding_std: standard deviation of the embedding at the start."""

    type: ClassVar[str] = "causal_lm"
    vocab_size: int
    backbone: BackboneBaseConfig
    tie_embeddings: bool = True
    pad_vocab_multiple: int = 1
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "CausalLMConfig"
        check_positive(name, vocab_size=self.vocab_size, pad_vocab_multiple=self.pad_vocab_multiple)
        check_positive(name, embedding_std=self.embedding_std)
        why = self.backbone.sees_the_future()
        if why is not None:
            raise ConfigError(f"{name}: {why}; a causal model may not see the future")

    @property
    def backbone_config(self) -> BackboneBaseConfig:
        return self.backbone

    @property
    def stack(self) -> BackboneConfig:
        """The backbone where it is a plain stack of blocks, the one kind that published formats have.

        Raises ConfigError for another one.
        """
        if not isinstance(self.backbone, BackboneConfig):
            raise ConfigError(f"CausalLMConfig: the backbone is {self.backbone.type!r}, expected 'backbone'")
        return self.backbone

    def build(self) -> CausalLM:
        return CausalLM(self)


class CausalLM(Model):
    """ids (batch, length) to logits (batch, length, vocab_size).

    logits[:, t] predict what follows ids[:, : t + 1]. The state it carries is its backbone's.
    """

    config: CausalLMConfig

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        d_model = config.backbone.d_model
        self.embedding = nn.Embedding(rows, d_model)
        self.backbone = config.backbone.build()
        tied = self.embedding if config.tie_embeddings else None
        self.head = LanguageHead(d_model, config.vocab_size, rows=rows, embedding=tied)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, ids: Tensor, state: State | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """ids: (batch, length) int64 or int32, or (1, total) packed by `seqs`, a `Sequences` or cu_seqlens
        (sequences + 1,). state: what an earlier call returned, or None; it is left untouched.

        Returns (logits (batch, length, vocab_size), new state).

        Raises TypeError or ValueError for ids of a wrong dtype, shape or outside the vocabulary. On CUDA the
        last is a device-side assertion, since looking at the ids would stop the host; check ids on the host
        where they are read.
        """
        hidden, state = self.hidden(ids, state, seqs=seqs)
        return self.logits(hidden), state

    def hidden(
        self, ids: Tensor, state: State | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """As `forward`, without the head: (backbone output (batch, length, d_model), new state).

        With `logits`, a loss over few positions computes logits at those alone: `model.logits(hidden[labels
        >= 0])`.
        """
        self._check_ids(ids)
        return self.backbone(self.embedding(ids), state, seqs=seqs)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) backbone outputs, any positions chosen, to (..., vocab_size) logits."""
        return self.head(hidden)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token for `batch` rows; device and dtype default to the parameters'."""
        return self.backbone.init_state(batch, device=device, dtype=dtype)

    @torch.no_grad()
    def step_(self, ids: Tensor, state: State) -> Tensor:
        """One token a row: ids (batch, 1) to logits (batch, 1, vocab_size); `state` is changed in place."""
        self._check_ids(ids)
        if ids.shape[1] != 1:
            raise ValueError(f"CausalLM.step_: ids has shape {tuple(ids.shape)}, expected (batch, 1)")
        return self.logits(self.backbone.step_(self.embedding(ids), state))

    def _check_ids(self, ids: object) -> None:
        check_ids("CausalLM", ids, self.config.vocab_size)

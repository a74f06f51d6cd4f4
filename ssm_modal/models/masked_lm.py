"""The masked language model: token embedding, a backbone that sees both sides, language head; for DNA with
one strand or both (Caduceus, arXiv 2403.03234)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssm_modal.backbone import BackboneBaseConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.heads.language import LanguageHead
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import check_ids
from ssm_modal.layers.reverse_complement import Strands, StrandsConfig
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.state import State


@dataclass(frozen=True)
class MaskedLMConfig(ModelConfig):
    """vocab_size ids, 0 to vocab_size - 1.

    strands: None, or both strands of DNA read with the same parameters (Caduceus-PS): per-position logits are
    then equivariant under the reverse complement (`ssm_modal.layers.reverse_complement`), backbone.d_model is
    the width of one strand, and `hidden` has twice as many channels. tie_embeddings, pad_vocab_multiple,
    embedding_std: as for `CausalLMConfig`.
    """

    type: ClassVar[str] = "masked_lm"
    vocab_size: int
    backbone: BackboneBaseConfig
    strands: StrandsConfig | None = None
    tie_embeddings: bool = True
    pad_vocab_multiple: int = 1
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "MaskedLMConfig"
        check_positive(name, vocab_size=self.vocab_size, pad_vocab_multiple=self.pad_vocab_multiple)
        check_positive(name, embedding_std=self.embedding_std)
        if self.strands is None and self.backbone.causal:
            raise ConfigError(
                f"{name}: the backbone is causal, but what is masked is read from both sides; set "
                "backbone.bidirectional"
            )

    @property
    def backbone_config(self) -> BackboneBaseConfig:
        return self.backbone

    def build(self) -> MaskedLM:
        return MaskedLM(self)


class MaskedLM(Model):
    """ids (batch, length) to logits (batch, length, vocab_size); logits[:, t] say what stands at t.

    Needs the whole sequence: it has no state. `hidden` holds d_model channels, with strands 2 d_model: those
    of the strand given and, at the same base, those of the other. A head that is to tell the strands apart
    reads them side by side; an invariant one reads their mean.
    """

    config: MaskedLMConfig

    def __init__(self, config: MaskedLMConfig) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        d_model = config.backbone.d_model
        self.strands = None if config.strands is None else Strands(config.strands, config.vocab_size)
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
    ) -> tuple[Tensor, None]:
        """ids: (batch, length) int64 or int32, or (1, total) packed by `seqs`, a `Sequences` or cu_seqlens
        (sequences + 1,). Returns (logits (batch, length, vocab_size), None).

        Raises StateError for a state, and TypeError or ValueError for ids of a wrong dtype, shape or outside
        the vocabulary (on CUDA the last is a device-side assertion).
        """
        hidden, _ = self.hidden(ids, state, seqs=seqs)
        return self.logits(hidden), None

    def hidden(
        self, ids: Tensor, state: State | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As `forward`, without the head: (batch, length, d_model), with strands (batch, length, 2 d_model),
        and None."""
        if state is not None:
            raise StateError("MaskedLM: was given a state, but needs the whole sequence and has none")
        check_ids("MaskedLM", ids, self.config.vocab_size)
        if self.strands is None:
            return self.backbone(self.embedding(ids), seqs=seqs)[0], None
        if seqs is not None:
            seqs = Sequences.from_cu_seqlens(seqs, ids.shape[1], ids.device)
        rows, packed = self.strands.both(ids, seqs)
        hidden, _ = self.backbone(self.embedding(rows), seqs=packed)
        return self.strands.join(hidden, seqs), None

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` at any positions chosen, (..., d_model) or with strands (..., 2 d_model), to logits
        (..., vocab_size)."""
        if self.strands is None:
            return self.head(hidden)
        given, other = hidden.chunk(2, dim=-1)
        return self.strands.mean_logits(self.head(given), self.head(other))

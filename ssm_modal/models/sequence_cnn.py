"""The convolutional baseline of sequence classification: a plain CNN over token ids."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import check_ids
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.state import State


@dataclass(frozen=True)
class SequenceCNNConfig(ModelConfig):
    """n_layers convolutions of d_model channels and `kernel` steps (odd, zeros beyond the ends), each with
    batch norm, ReLU, dropout and, but for the last, the greatest of every two steps; the greatest of each
    channel over what is left; a Linear to n_classes. The first convolution reads one-hot ids."""

    type: ClassVar[str] = "sequence_cnn"
    n_classes: int
    vocab_size: int
    d_model: int = 128
    n_layers: int = 3
    kernel: int = 11
    dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "SequenceCNNConfig"
        check_positive(name, n_classes=self.n_classes, vocab_size=self.vocab_size, d_model=self.d_model)
        check_positive(name, n_layers=self.n_layers, kernel=self.kernel)
        if self.kernel % 2 == 0:
            raise ConfigError(f"{name}: kernel is {self.kernel}, expected an odd number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}: dropout is {self.dropout}, expected 0 or more and below 1")

    def build(self) -> SequenceCNN:
        return SequenceCNN(self)


class SequenceCNN(Model):
    """ids to logits (sequences, n_classes). Packed sequences give what they give one by one, but for batch
    norm in training, whose statistics are those of all steps of the batch."""

    config: SequenceCNNConfig

    def __init__(self, config: SequenceCNNConfig) -> None:
        super().__init__()
        self.config = config
        # One-hot vectors as an embedding that is not trained: what attributes a decision to bases reads it.
        self.one_hot = nn.Embedding.from_pretrained(torch.eye(config.vocab_size), freeze=True)
        widths = [config.vocab_size, *[config.d_model] * config.n_layers]
        self.convs = nn.ModuleList(
            nn.Conv1d(before, after, config.kernel, padding=config.kernel // 2)
            for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[1:])
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, config.n_classes)

    def forward(
        self, x: Tensor, state: State | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x: ids (batch, length) int64 or int32, or (1, total) packed by `seqs`, a `Sequences` or cu_seqlens
        (sequences + 1,). Returns (logits (batch or sequences, n_classes), None).

        Raises StateError for a state, TypeError or ValueError for ids of a wrong dtype, shape or outside the
        vocabulary, and ValueError for a sequence without a step.
        """
        name = type(self).__name__
        if state is not None:
            raise StateError(f"{name}: was given a state, but needs the whole sequence and has none")
        check_ids(name, x, self.config.vocab_size)
        if seqs is not None:
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
        lengths = list(seqs.lengths) if seqs is not None else [x.shape[1]] * x.shape[0]
        if not lengths or min(lengths) < 1:
            raise ValueError(f"{name}: a sequence has no step, expected one or more")
        longest = max(lengths)
        if min(lengths) == longest:
            ids, known = x.reshape(len(lengths), longest), None
        else:
            ids = nn.utils.rnn.pad_sequence(list(x[0].split(lengths)), batch_first=True)
            sizes = torch.tensor(lengths, device=x.device)
            known = torch.arange(longest, device=x.device) < sizes[:, None]
        hidden = self._masked(self.one_hot(ids).transpose(1, 2), known)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            hidden = self.dropout(self._normed(norm, conv(hidden), known).relu())
            hidden = self._masked(hidden, known)  # zeros beyond the ends, as for a sequence alone
            if i < len(self.convs) - 1 and hidden.shape[-1] > 1:
                hidden = nn.functional.max_pool1d(hidden, 2, ceil_mode=True)
                known = None if known is None else _pairs(known)
        # After ReLU no step is below the zeros beyond the ends.
        return self.head(hidden.amax(-1)), None

    def _masked(self, hidden: Tensor, known: Tensor | None) -> Tensor:
        return hidden if known is None else hidden * known[:, None].to(hidden.dtype)

    def _normed(self, norm: nn.Module, hidden: Tensor, known: Tensor | None) -> Tensor:
        """Batch norm over the steps there are."""
        if known is None:
            return norm(hidden)
        steps = hidden.transpose(1, 2)
        out = torch.zeros_like(steps)
        out[known] = norm(steps[known]).to(out.dtype)
        return out.transpose(1, 2)


def _pairs(known: Tensor) -> Tensor:
    """Which pairs of steps hold a step: (rows, length) to (rows, ceil(length / 2)) bool."""
    return nn.functional.pad(known, (0, known.shape[1] % 2)).unflatten(1, (-1, 2)).any(-1)

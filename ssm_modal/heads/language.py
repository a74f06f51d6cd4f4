"""The language-model head: hidden vectors to logits over a vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LanguageHead(nn.Module):
    """(..., d_model) to (..., vocab_size) logits, at any positions chosen.

    `embedding`: the token embedding whose weight a tied head reads, or None for a weight of its own. A tied
    head owns no parameter, so that the weight exists once, in the state dict too. `rows` (at least
    vocab_size) is the height of the weight; logits of its padding are cut off, so that no id beyond the
    vocabulary can be predicted.
    """

    def __init__(self, d_model: int, vocab_size: int, *, rows: int, embedding: nn.Embedding | None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.rows = rows
        self.proj = nn.Linear(d_model, rows, bias=False) if embedding is None else None
        # In a tuple: the embedding is the model's module, not a second time this one's.
        self._tied = (embedding,)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., d_model), a backbone's output."""
        tied = self._tied[0]
        if self.proj is not None:
            logits = self.proj(hidden)
        else:
            assert tied is not None
            logits = F.linear(hidden, tied.weight)
        return logits if self.rows == self.vocab_size else logits[..., : self.vocab_size]

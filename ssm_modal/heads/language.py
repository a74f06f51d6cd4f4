"""The language-model head: hidden vectors to logits over a vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LanguageHead(nn.Module):
    """(..., d_model) to (..., vocab_size) logits.

    With `tied` it owns no weight and reads the embedding's, given at the call: the weight then exists once, in the
    state dict too. `padded` (at least vocab_size) is the width of the weight; logits of the padding are cut off, so
    that no id beyond the vocabulary can be predicted.
    """

    def __init__(self, d_model: int, vocab_size: int, *, padded: int, tied: bool) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.padded = padded
        self.proj = None if tied else nn.Linear(d_model, padded, bias=False)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden: (..., d_model); embedding: (padded, d_model), used where the head is tied."""
        logits = F.linear(hidden, embedding) if self.proj is None else self.proj(hidden)
        return logits if self.padded == self.vocab_size else logits[..., : self.vocab_size]

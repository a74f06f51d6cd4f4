"""Language models of DNA whose probabilities are known: tables over the token before, or the neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 9


class _Config:
    vocab_size = VOCAB

    def __init__(self, kind: str) -> None:
        self.kind = kind


class TableLM(nn.Module):
    """log P of a token from a table: causal, by the token before (order-1 Markov); masked, by the sum of what
    both neighbours say, so that both sides matter. Batches are counted."""

    def __init__(self, causal: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        # The config's class says what a model is.
        kind = type("Config", (_Config,), {"type": "causal_lm" if causal else "masked_lm"})
        self.config = kind("")
        generator = torch.Generator().manual_seed(seed)
        self.left = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator).to(dtype))
        self.right = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator).to(dtype))
        self.causal, self.strands = causal, None
        self.backbone = SimpleNamespace(config=SimpleNamespace(n_layers=1))
        self.shapes: list[tuple[int, ...]] = []

    def hidden(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.shapes.append(tuple(ids.shape))
        if self.causal:
            return self.left[ids], torch.zeros(1)
        before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=5)
        after = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=5)
        return self.left[before] + self.right[after], None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

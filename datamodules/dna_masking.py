"""Masked modelling of DNA: which tokens are hidden, and what stands in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_modal.tokenizers.dna import DNATokenizer

IGNORE = -100


def mask_tokens(
    ids: Tensor, tokenizer: DNATokenizer, generator: torch.Generator, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide tokens of `ids` (n,) int64; returns what the model is given and the labels, both (n,) int64.

    About `rate` of the tokens are chosen, of them 80 % become the mask, 10 % a token drawn from those of
    known bases, 10 % stay (BERT, arXiv 1810.04805). A label is the token at a chosen place, -100 elsewhere;
    only tokens of known bases (below `n_concrete`) are chosen.

    Where neighbouring tokens share bases (k-mers that overlap) whole runs of 2k - 1 tokens or more are
    chosen, each with one fate: at least k bases of a run are in none of the tokens beside it, and each of its
    tokens holds at least one of them, so that neighbours do not spell out the answer. At the ends of `ids` a
    run may be cut; the law holds there too.
    """
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate is {rate}, expected more than 0 and less than 1")
    n = ids.shape[0]
    shared = -(-tokenizer.span // tokenizer.step)  # tokens that hold a base
    run = 2 * shared - 1
    # A token is chosen when one of `run` beginnings falls on it or shortly before it; so many give the rate.
    beginnings = torch.rand(n + run - 1, generator=generator) < 1.0 - (1.0 - rate) ** (1.0 / run)
    ends = torch.nn.functional.pad(beginnings.to(torch.int64).cumsum(0), (1, 0))
    chosen = ends[run:] - ends[:-run] > 0
    fate = torch.rand(n, generator=generator)
    if shared > 1:
        first = chosen & ~torch.nn.functional.pad(chosen[:-1], (1, 0))
        fate = fate[(first.to(torch.int64).cumsum(0) - 1).clamp(min=0)]
    drawn = torch.randint(0, tokenizer.n_concrete, (n,), generator=generator)
    chosen &= ids < tokenizer.n_concrete
    labels = torch.where(chosen, ids, IGNORE)
    given = torch.where(chosen & (fate < 0.8), tokenizer.mask_id, ids)
    return torch.where(chosen & (fate >= 0.8) & (fate < 0.9), drawn, given), labels

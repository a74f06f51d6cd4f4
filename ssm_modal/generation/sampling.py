"""From logits to tokens: pure functions on logits (rows, vocab_size), each row on its own.

A filter takes a token out by setting its logit to -inf; the likeliest token always stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_modal.generation.config import GenerationConfig

# What `choose` gives for a row whose logits hold NaN or leave no token.
NO_TOKEN = -1


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's penalised sampling (arXiv 1909.05858, section 4.1).

    The logit x of a seen token becomes x / penalty where x > 0 and x * penalty elsewhere, so that a penalty
    above 1 always lowers it.

    seen: (rows, vocab_size) bool.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and those equal to the k-th."""
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens, likeliest first, whose probabilities together reach p.

    Nucleus sampling (arXiv 1904.09751, section 3.1). A token stays when the likelier ones before it
    sum to less than p.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drop = before >= p
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose probability is at least p times the likeliest one's (arXiv 2407.01082)."""
    if p <= 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def filtered(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Logits (rows, vocab_size) after temperature, top-k, top-p and min-p, in fp32 (fp64 stays)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    return keep_min_p(keep_top_p(logits, config.top_p), config.min_p)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, (rows,) int64, with the probabilities softmax(logits).

    uniform: (rows,) float64 in [0, 1), the randomness; token i is drawn where uniform falls into its part of
    the cumulated probabilities. A token of probability 0 is never drawn.
    """
    heights = logits.softmax(-1).to(torch.float64).cumsum(-1)
    total = heights[:, -1]
    # Below the total even where the product is rounded up.
    at = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(heights, at[:, None], right=True).squeeze(-1)


def choose(logits: Tensor, config: GenerationConfig, uniform: Tensor | None, seen: Tensor | None) -> Tensor:
    """The next token of each row, (rows,) int64; NO_TOKEN where the logits hold NaN or are all -inf.

    logits: (rows, vocab_size) floating. uniform: (rows,) float64, see `draw`; not needed when greedy. seen:
    the tokens of each row so far, (rows, vocab_size) bool; not needed without a repetition penalty.
    """
    broken = logits.isnan().any(-1) | (logits == -torch.inf).all(-1)
    if config.repetition_penalty != 1:
        if seen is None:
            raise ValueError("seen is None, expected (rows, vocab_size) bool for a repetition penalty")
        logits = penalise_repetition(logits, seen, config.repetition_penalty)
    if config.greedy:
        tokens = logits.argmax(-1)
    else:
        if uniform is None:
            raise ValueError("uniform is None, expected (rows,) float64 for sampling")
        tokens = draw(filtered(logits, config), uniform)
    return tokens.masked_fill(broken, NO_TOKEN)

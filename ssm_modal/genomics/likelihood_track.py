"""The log-likelihood of each base along a region, from either strand or both.

A causal model gives log P(base | the bases before it), read through its state, so that a region may have any
length. A masked one gives log P(base | the others): every `spacing`-th base is hidden at once, in as many
passes as that takes, which is about as many as in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssm_modal.genomics.log_probs import LogProbs, gathered
from ssm_modal.genomics.places import Place
from ssm_modal.genomics.streaming import HiddenStates, StreamConfig
from ssm_modal.genomics.variant_scores import Strands
from ssm_modal.io.genome import Genome
from ssm_modal.tokenizers.dna import DNATokenizer

SPACING = 8


@torch.inference_mode()
def likelihood_track(
    place: Place,
    genome: Genome,
    tokenizer: DNATokenizer,
    log_probs: LogProbs,
    *,
    strands: Strands = "both",
    context: int = 4096,
    spacing: int = SPACING,
    stream: StreamConfig | None = None,
) -> Tensor:
    """log P of each base of `place` in nats, float64 (bases,), in the order of the plus strand.

    NaN where a base is not known and where no strand predicts it (a causal model does not predict the first
    base it reads); else the mean over the strands that do. context: bases on either side that are read too.

    Tokens of several bases: a causal one's log P is shared out over the bases that it adds; a masked base has
    the mean over the tokens that hold it, each its share of a token without overlap.
    """
    end = genome.records[place.record].length
    whole = Place(place.name, place.record, max(0, place.start - context), min(end, place.end + context), "+")
    config = stream or StreamConfig()
    hidden = HiddenStates(log_probs.model)
    totals = torch.zeros(whole.bases, dtype=torch.float64)
    counts = torch.zeros(whole.bases, dtype=torch.int64)
    for other in {"both": (False, True), "+": (False,), "-": (True,)}[strands]:

        def read(first: int, last: int, other: bool = other) -> Tensor:
            return whole.ids(genome, tokenizer, first, last, other=other)

        tokens = tokenizer.tokens_in(whole.bases)
        if log_probs.causal:
            values = _causal(read, tokens, whole.bases, tokenizer, hidden, config)
        else:
            values = _masked(read, tokens, whole.bases, tokenizer, hidden, config, spacing)
        if other:
            values = values.flip(0)
        known = ~values.isnan()
        totals[known] += values[known]
        counts += known
    mean = totals / counts.where(counts > 0, torch.ones_like(counts))
    mean[counts == 0] = float("nan")
    return mean[place.start - whole.start : place.end - whole.start]


def _causal(
    read: Callable[[int, int], Tensor],
    tokens: int,
    bases: int,
    tokenizer: DNATokenizer,
    hidden: HiddenStates,
    config: StreamConfig,
) -> Tensor:
    """log P of each base but those of the first token, float64 (bases,), in reading order."""
    values = torch.full((bases,), float("nan"), dtype=torch.float64)
    step = tokenizer.step
    for first, vectors in hidden.stream(read, tokens, config):
        last = min(first + len(vectors), tokens - 1)
        after = read(first, last + 1)[1:] if last > first else torch.empty(0, dtype=torch.int64)
        places = (after < tokenizer.n_concrete).nonzero()[:, 0]
        found = gathered(hidden.model.logits, vectors[None], torch.zeros_like(places), places, after[places])
        # Token t adds the last `step` bases of those it holds.
        begin = (first + 1 + places) * step + tokenizer.span - step
        for j in range(step):
            values[begin + j] = found / step
    return values


def _masked(
    read: Callable[[int, int], Tensor],
    tokens: int,
    bases: int,
    tokenizer: DNATokenizer,
    hidden: HiddenStates,
    config: StreamConfig,
    spacing: int,
) -> Tensor:
    """log P of each base by hiding every `spacing`-th, float64 (bases,), in reading order."""
    shared = -(-tokenizer.span // tokenizer.step)  # tokens that hold a base
    apart = max(spacing, 2 * shared)
    sums = torch.zeros(bases, dtype=torch.float64)
    counts = torch.zeros(bases, dtype=torch.int64)
    for offset in range(apart):
        # Hidden are runs of `shared` tokens, which end with tokens offset, offset + apart, ...

        def hide(first: int, last: int, offset: int = offset) -> Tensor:
            ids = read(first, last)
            place = (torch.arange(first, last) - offset) % apart
            return ids.where(place < apart - shared + 1, tokenizer.mask_id).where(
                place != 0, tokenizer.mask_id
            )

        for first, vectors in hidden.stream(hide, tokens, config):
            ids = read(first, first + len(vectors))
            number = torch.arange(first, first + len(vectors))
            place = (number - offset) % apart
            asked = ((place == 0) | (place >= apart - shared + 1)) & (ids < tokenizer.n_concrete)
            places = asked.nonzero()[:, 0]
            found = gathered(
                hidden.model.logits, vectors[None], torch.zeros_like(places), places, ids[places]
            )
            token = number[places]
            if tokenizer.step == tokenizer.span:
                for j in range(tokenizer.span):
                    sums.index_add_(0, token * tokenizer.step + j, found / tokenizer.span)
                    counts.index_add_(0, token * tokenizer.step + j, torch.ones_like(token))
            else:
                # The base that all tokens of the run hold: the first of the run's last token.
                base = token + (offset - token) % apart
                inside = base < bases
                sums.index_add_(0, base[inside], found[inside])
                counts.index_add_(0, base[inside], torch.ones_like(base[inside]))
    mean = sums / counts.clamp(min=1)
    mean[counts == 0] = float("nan")
    return mean

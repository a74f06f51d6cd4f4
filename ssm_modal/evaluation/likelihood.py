"""Log-likelihoods of tokens, read in pieces the state carried, so that length does not set the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_modal.generation.prompts import CausalModel, check_prompts, device_of, evaluating
from ssm_modal.kernels.sequences import Sequences

LOGITS = 1 << 26  # numbers of logits that exist at once


@dataclass(frozen=True)
class Scored:
    """What a model says of a row's tokens. logprobs: (n,) fp32 (fp64 of an fp64 model) on the host, nats,
    negative. greedy: (n,) bool, whether each was the likeliest token."""

    logprobs: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class TextScore:
    """Of a whole text. nats: minus the sum of the log-likelihoods. targets: tokens predicted. bytes: of UTF-8
    that these tokens stand for."""

    nats: float
    targets: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the nats a token."""
        return math.exp(self.nats / self.targets) if self.targets else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@torch.no_grad()
def score_rows(
    model: CausalModel,
    rows: Sequence[Sequence[int] | Tensor],
    starts: Sequence[int],
    *,
    segment: int = 8192,
) -> list[Scored]:
    """The log-likelihood of the tokens of each row from `starts[row]` (1 or more) on, given all before them.

    rows: ids of any lengths, read together without padding, `segment` tokens at once at most (but one a
    row). Raises ValueError for empty rows, ids outside the vocabulary and starts outside the row.
    """
    ids = check_prompts(rows, model.config.vocab_size)
    if len(starts) != len(ids):
        raise ValueError(f"starts has {len(starts)} numbers, expected {len(ids)}, one a row")
    for i, (row, start) in enumerate(zip(ids, starts)):
        if not 1 <= start <= row.shape[0]:
            raise ValueError(f"starts[{i}] is {start}, expected 1 to {row.shape[0]}, the length of the row")
    if segment < 1:
        raise ValueError(f"segment is {segment}, expected 1 or more")
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ids]
    device, state = device_of(model), None
    at = [0] * len(ids)
    ends = [row.shape[0] - 1 for row in ids]  # the last token is predicted and not read
    with evaluating(model):
        while True:
            waiting = sum(a < end for a, end in zip(at, ends))
            if not waiting:
                break
            share = max(1, segment // waiting)
            lengths = [min(share, end - a) for a, end in zip(at, ends)]
            piece = torch.cat([row[a : a + n] for row, a, n in zip(ids, at, lengths)]).to(device)
            seqs = Sequences.from_lengths(lengths, device) if len(ids) > 1 else None
            hidden, state = model.hidden(piece[None], state, seqs=seqs)
            first = 0
            for i, n in enumerate(lengths):
                # The output at a position is about the token behind it.
                skip = min(n, max(0, starts[i] - 1 - at[i]))
                targets = ids[i][at[i] + skip + 1 : at[i] + n + 1]
                if targets.numel():
                    parts[i].append(_score(model, hidden[0, first + skip : first + n], targets.to(device)))
                first, at[i] = first + n, at[i] + n
    empty = (torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    return [Scored(*(torch.cat(which).cpu() for which in zip(*(own or [empty])))) for own in parts]


def _score(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    step = max(1, LOGITS // model.config.vocab_size)
    found = []
    for start in range(0, targets.shape[0], step):
        logits = model.logits(hidden[start : start + step])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        own = targets[start : start + step]
        logprobs = logits.gather(1, own[:, None]).squeeze(1) - logits.logsumexp(-1)
        found.append((logprobs, logits.argmax(-1) == own))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def score_text(model: CausalModel, ids: Tensor, *, n_bytes: int, segment: int = 8192) -> TextScore:
    """A text of any length as one sequence: each token but the first given all before it.

    ids: (tokens,) integers. n_bytes: bytes that all but the first token stand for. The sum is taken in fp64.
    """
    (scored,) = score_rows(model, [ids], [1], segment=segment)
    return TextScore(-float(scored.logprobs.double().sum()), int(scored.logprobs.shape[0]), n_bytes)

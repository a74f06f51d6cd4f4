"""What a language model says of tokens in their sequence: the one place where scores meet a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_modal.models.base import Model

# Logits that stand in memory at once: positions x vocabulary.
_LOGITS = 1 << 25


def is_causal(model: Model) -> bool:
    """Whether the logits of a step predict the token behind it, and not its own.

    Raises TypeError for a model that is no language model over ids.
    """
    if not callable(getattr(model, "hidden", None)) or not callable(getattr(model, "logits", None)):
        raise TypeError(f"the model is a {type(model).__name__}, expected a causal or masked language model")
    return type(model.config).type == "causal_lm"


@dataclass(frozen=True, eq=False)
class Query:
    """Ask for log P of `targets` (m,) at `positions` (m,) of `ids` (n,), all int64 on the host.

    A causal model is asked for the token at a position given those before it (positions from 1 on), a masked
    one for the token at it given all of `ids`, which hold the mask there.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor


class LogProbs:
    """Answers queries in batches. model: in eval mode, on the device it is to run on.

    batch_tokens: tokens that go through the model at once; a longer sequence is a batch of its own.
    """

    def __init__(self, model: Model, batch_tokens: int) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}, expected 1 or more")
        self.model: Any = model
        self.causal = is_causal(model)
        self.batch_tokens = batch_tokens
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def __call__(self, queries: Sequence[Query]) -> list[Tensor]:
        """For each query its log-probabilities in nats, float64 (m,) on the host.

        Sequences that several queries share go through the model once, so that equal queries have equal
        answers to the bit.
        """
        rows: dict[bytes, int] = {}
        known: dict[tuple[int, bytes, bytes], int] = {}
        ids: list[Tensor] = []
        asked: list[list[Query]] = []
        places: list[tuple[int, int]] = []  # of each query: its sequence, and its place among those of it
        for query in queries:
            if self.causal and query.positions.numel() and int(query.positions.min()) < 1:
                raise ValueError("positions holds 0, but a causal model does not predict a sequence's first")
            row = rows.setdefault(query.ids.numpy().tobytes(), len(ids))
            if row == len(ids):
                ids.append(query.ids)
                asked.append([])
            key = (row, query.positions.numpy().tobytes(), query.targets.numpy().tobytes())
            place = known.setdefault(key, len(asked[row]))
            if place == len(asked[row]):
                asked[row].append(query)
            places.append((row, place))
        answers: list[list[Tensor]] = [[] for _ in ids]
        for batch in self._batches([len(row) for row in ids]):
            hidden = self.model.hidden(torch.stack([ids[i] for i in batch]).to(self.device))[0]
            wanted = [(at, query) for at, i in enumerate(batch) for query in asked[i]]
            row_of = torch.cat([torch.full_like(query.positions, at) for at, query in wanted])
            step = torch.cat([query.positions for _, query in wanted]) - int(self.causal)
            target = torch.cat([query.targets for _, query in wanted])
            found = gathered(self.model.logits, hidden, row_of, step, target)
            for (at, _), answer in zip(wanted, found.split([len(q.positions) for _, q in wanted])):
                answers[batch[at]].append(answer)
        return [answers[row][place] for row, place in places]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of sequences of one length, as many as the budget holds; each batch is a full rectangle."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            full = bool(batch) and (len(batch) + 1) * lengths[i] > self.batch_tokens
            if batch and (full or lengths[i] != lengths[batch[0]]):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def gathered(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, row: Tensor, step: Tensor, target: Tensor
) -> Tensor:
    """log P of `target` (m,) by the logits of `hidden` (batch, length, width) at (row, step), in pieces.

    Returns float64 (m,) on the host.
    """
    found = []
    at = 0
    size = 1
    while at < len(row):
        rows, steps, wanted = (x[at : at + size].to(hidden.device) for x in (row, step, target))
        scores = logits(hidden[rows, steps])
        # fp32 at least: half precision would round differences of alleles away.
        log_p = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
        found.append(log_p.gather(-1, wanted[:, None])[:, 0].double().cpu())
        at += size
        size = max(1, _LOGITS // scores.shape[-1])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

"""Reading prompts: of any lengths, end to end and in pieces, so that their length does not set the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ssm_modal.errors import StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.mamba import keep_A
from ssm_modal.state import State


class CausalModel(Protocol):
    """What generation asks of a model, a `torch.nn.Module`, such as `ssm_modal.models.CausalLM`."""

    @property
    def config(self) -> Any:
        """Has `vocab_size`."""

    def hidden(self, ids: Tensor, state: Any = None, *, seqs: Sequences | None = None) -> tuple[Tensor, Any]:
        """ids (1, total) to ((1, total, d_model), new state), the given state untouched."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) to (..., vocab_size)."""

    def step_(self, ids: Tensor, state: Any) -> Tensor:
        """ids (batch, 1) to logits (batch, 1, vocab_size); the state changes in place."""


@torch.no_grad()
def prefill(
    model: CausalModel,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    state: State | None = None,
    prefill_tokens: int = 8192,
) -> tuple[Tensor, State]:
    """Read prompts of any lengths, without padding and in pieces of at most about `prefill_tokens` tokens.

    prompts: ids of each row, at least one. state: one row a prompt, what was read before; it stays untouched.
    Returns the logits of what follows each prompt, (rows, vocab_size), and the state after the prompts.
    Raises ValueError for an empty prompt or an id outside the vocabulary, StateError for a state that does
    not fit.
    """
    rows = check_prompts(prompts, model.config.vocab_size)
    with evaluating(model):
        return read_prompts(model, rows, state, prefill_tokens)


def read_prompts(
    model: CausalModel, rows: list[Tensor], state: State | None, budget: int
) -> tuple[Tensor, State]:
    """`prefill` of checked `rows`."""
    if budget < 1:
        raise ValueError(f"prefill_tokens is {budget}, expected 1 or more")
    if state is not None and not isinstance(state, State):
        raise StateError(f"state is a {type(state).__name__}, expected a State with one row a prompt")
    if state is not None and state.batch_size != len(rows):
        raise StateError(f"state has {state.batch_size} rows, expected {len(rows)}, one a prompt")
    device = device_of(model)
    at = [0] * len(rows)
    last: list[Tensor | None] = [None] * len(rows)
    while True:
        waiting = [i for i, row in enumerate(rows) if at[i] < row.shape[0]]
        if not waiting:
            break
        share = max(1, budget // len(waiting))
        # Rows already read through stand there with length 0, which hands their state on.
        lengths = [min(share, row.shape[0] - at[i]) for i, row in enumerate(rows)]
        ids = torch.cat([row[at[i] : at[i] + n] for i, (row, n) in enumerate(zip(rows, lengths))])
        seqs = Sequences.from_lengths(lengths, device) if len(rows) > 1 else None
        hidden, state = model.hidden(ids.to(device)[None], state, seqs=seqs)
        end = 0
        for i, n in enumerate(lengths):
            end, at[i] = end + n, at[i] + n
            if n and at[i] == rows[i].shape[0]:
                last[i] = hidden[0, end - 1].clone()
    if state is None:
        raise StateError(f"{type(model).__name__} carries no state, so it cannot generate token by token")
    return model.logits(torch.stack([h for h in last if h is not None])), state


def check_prompts(prompts: Sequence[Sequence[int] | Tensor], vocab_size: int) -> list[Tensor]:
    """The ids of each prompt, (length,) int64 on the host; raises as `generate` says."""
    if isinstance(prompts, (str, Tensor)):
        raise TypeError(f"prompts is a {type(prompts).__name__}, expected a list with the ids of each prompt")
    if not prompts:
        raise ValueError("prompts is empty, expected at least one prompt")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise TypeError(f"prompts[{i}] is a string, expected ids; encode it with the model's tokenizer")
        ids = prompt.cpu() if isinstance(prompt, Tensor) else torch.tensor(list(prompt))
        if ids.ndim != 1:
            raise ValueError(f"prompts[{i}] has shape {tuple(ids.shape)}, expected (length,)")
        if ids.shape[0] == 0:
            raise ValueError(f"prompts[{i}] is empty, expected at least one token")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"prompts[{i}] has dtype {ids.dtype}, expected integers")
        ids = ids.to(torch.int64)
        bad = ((ids < 0) | (ids >= vocab_size)).nonzero()
        if bad.numel():
            at = int(bad[0])
            raise ValueError(
                f"prompts[{i}] holds id {int(ids[at])} at position {at}, expected 0 to {vocab_size - 1}, "
                "the model's vocabulary"
            )
        rows.append(ids)
    return rows


def device_of(model: Any) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode with constant weights meanwhile; each module gets back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with keep_A(model):
            yield
    finally:
        for module in training:
            module.training = True

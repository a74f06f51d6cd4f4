"""Generation: prompts of unequal length read end to end, then one step a token through the carried state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ssm_modal.errors import StateError
from ssm_modal.generation.config import GenerationConfig
from ssm_modal.generation.sampling import NO_TOKEN, choose
from ssm_modal.generation.stopping import RowText
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.state import State
from ssm_modal.tokenizers.base import TextTokenizer

Finish = Literal["length", "eos", "stop"]

# Random numbers of a row that are drawn and moved to the device at once.
_DRAWS = 64


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


@dataclass(frozen=True)
class GenerationResult:
    """What came of each prompt, in the order of the prompts.

    tokens: the new tokens, all of them: those of a stop text too, but not the end-of-text token.
    finish: why each row ended: "length", "eos" or "stop".
    texts: the new text, cut before a stop text; None without a tokenizer.
    states: for each row a state of one row that has read prompt and `tokens`, so that
        `generate(model, [more], config, state=states[i])` goes on as if it had read all of it; None unless
        asked for.
    """

    tokens: list[list[int]]
    finish: list[Finish]
    texts: list[str] | None = None
    states: list[State] | None = None


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
    rows = _check_prompts(prompts, model.config.vocab_size)
    with _evaluating(model):
        return _prefill(model, rows, state, prefill_tokens)


@torch.no_grad()
def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int] | Tensor],
    config: GenerationConfig,
    *,
    state: State | None = None,
    tokenizer: TextTokenizer | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    return_states: bool = False,
) -> GenerationResult:
    """Continue each prompt, all in one batch; what becomes of one does not depend on the others.

    model: a causal language model on any device; it is used in evaluation mode.
    prompts: the ids of each row, lists or 1-D tensors, of any lengths of at least 1.
    state: one row a prompt: what was read before the prompts (see `prefill`). It stays untouched. A
        repetition penalty counts the prompts' tokens and the new ones, not those the state has read.
    tokenizer: gives texts; needed for stop texts and `on_text`. Tokens beyond its vocabulary are never
    chosen.
    on_token: called with (row, token) for each new token as it comes.
    on_text: called with (row, text) for each piece of new text as soon as it is certain: whole characters, no
        part of a stop text. The pieces of a row joined are its text.
    return_states: also return the state of each row.

    Raises ValueError for prompts that are empty or hold ids outside the vocabulary, for stop texts without a
    tokenizer, and RuntimeError when the model gives NaN; StateError for a state that does not fit.
    """
    rows = _check_prompts(prompts, model.config.vocab_size)
    if tokenizer is None and (config.stop or on_text is not None):
        what = "stop" if config.stop else "on_text"
        raise ValueError(f"{what} is given without a tokenizer, which is needed to turn tokens into text")
    with _evaluating(model):
        return _Run(model, rows, config, tokenizer, on_token, on_text, return_states).run(state)


class _Run:
    """One call of `generate`. `live`: the rows still going, in the order of the state's rows."""

    def __init__(
        self,
        model: CausalModel,
        rows: list[Tensor],
        config: GenerationConfig,
        tokenizer: TextTokenizer | None,
        on_token: Callable[[int, int], None] | None,
        on_text: Callable[[int, str], None] | None,
        return_states: bool,
    ) -> None:
        self.model, self.rows, self.config = model, rows, config
        self.on_token, self.on_text = on_token, on_text
        self.device = _device_of(model)
        size = model.config.vocab_size
        self.limit = size if tokenizer is None else min(size, tokenizer.vocab_size)
        self.eos_id = config.eos_id if config.eos_id is not None or tokenizer is None else tokenizer.eos_id
        if not config.stop_at_eos:
            self.eos_id = None
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.finish: list[Finish | None] = [None] * len(rows)
        self.states: list[State | None] | None = [None] * len(rows) if return_states else None
        self.texts: list[RowText] | None = None
        if tokenizer is not None:
            # The decoder sees the end of the prompt, so that a first word keeps its space.
            inside = [[t for t in r[-8:].tolist() if t < tokenizer.vocab_size] for r in rows]
            self.texts = [RowText(tokenizer.stream(before), config.stop) for before in inside]
        self.generators: list[torch.Generator] = []
        if not config.greedy:
            seed = config.seed if config.seed is not None else int(torch.randint(1 << 62, ()))
            self.generators = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
        self.draws: Iterator[Tensor] = iter(())
        hidden = [token for token in config.suppress_tokens if token < self.limit]
        self.suppressed = torch.tensor(hidden, dtype=torch.int64, device=self.device) if hidden else None
        self.live = list(range(len(rows)))
        self.seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self.seen = torch.zeros(len(rows), self.limit, dtype=torch.bool)
            for row, ids in enumerate(rows):
                self.seen[row, ids[ids < self.limit]] = True
            self.seen = self.seen.to(self.device)

    def run(self, state: State | None) -> GenerationResult:
        logits, state = _prefill(self.model, self.rows, state, self.config.prefill_tokens)
        while True:
            chosen = self._choose(logits)
            going = self._take(chosen.tolist(), state)
            if not going:
                break
            if len(going) < len(self.live):
                keep = torch.tensor(going, device=self.device)
                state, chosen = state.select(keep), chosen[keep]
                self.seen = None if self.seen is None else self.seen[keep]
                self.draws = iter([draw[keep] for draw in self.draws])
                self.live = [self.live[at] for at in going]
            if self.seen is not None:
                self.seen.scatter_(1, chosen[:, None], True)
            logits = self.model.step_(chosen[:, None], state)[:, -1]
        return GenerationResult(
            self.tokens,
            [f for f in self.finish if f is not None],
            None if self.texts is None else [row.text for row in self.texts],
            None if self.states is None else [s for s in self.states if s is not None],
        )

    def _choose(self, logits: Tensor) -> Tensor:
        """(live rows,) int64: the next tokens."""
        uniform = None
        if self.generators:
            uniform = next(self.draws, None)
            if uniform is None:
                rows = [
                    torch.rand(_DRAWS, dtype=torch.float64, generator=self.generators[r]) for r in self.live
                ]
                self.draws = iter(torch.stack(rows, dim=1).to(self.device).unbind())
                uniform = next(self.draws)
        logits = logits[:, : self.limit]
        if self.suppressed is not None:
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        return choose(logits, self.config, uniform, self.seen)

    def _take(self, chosen: list[int], state: State) -> list[int]:
        """Note the chosen tokens; returns the places in `live` of the rows that go on."""
        going = []
        for at, (row, token) in enumerate(zip(self.live, chosen)):
            if token == NO_TOKEN:
                raise RuntimeError(
                    f"the model's logits for row {row} hold NaN or leave no token, after "
                    f"{len(self.tokens[row])} new tokens; its weights are damaged or "
                    "its dtype is too narrow (try float32)"
                )
            if token == self.eos_id:
                self._end(row, "eos", at, None, state)
                continue
            self.tokens[row].append(token)
            if self.on_token is not None:
                self.on_token(row, token)
            if self.texts is not None:
                self._emit(row, self.texts[row].push(token))
            if self.texts is not None and self.texts[row].stopped:
                self._end(row, "stop", at, token, state)
            elif len(self.tokens[row]) >= self.config.max_new_tokens:
                self._end(row, "length", at, token, state)
            else:
                going.append(at)
        return going

    def _end(self, row: int, why: Finish, at: int, unread: int | None, state: State) -> None:
        if self.texts is not None:
            self._emit(row, self.texts[row].finish())
            # What the decoder held back may complete a stop text.
            why = "stop" if self.texts[row].stopped else why
        self.finish[row] = why
        if self.states is not None:
            own = state.select([at])
            if unread is not None:
                self.model.step_(torch.tensor([[unread]], device=self.device), own)
            self.states[row] = own

    def _emit(self, row: int, text: str) -> None:
        if text and self.on_text is not None:
            self.on_text(row, text)


def _prefill(
    model: CausalModel, rows: list[Tensor], state: State | None, budget: int
) -> tuple[Tensor, State]:
    if budget < 1:
        raise ValueError(f"prefill_tokens is {budget}, expected 1 or more")
    if state is not None and not isinstance(state, State):
        raise StateError(f"state is a {type(state).__name__}, expected a State with one row a prompt")
    if state is not None and state.batch_size != len(rows):
        raise StateError(f"state has {state.batch_size} rows, expected {len(rows)}, one a prompt")
    device = _device_of(model)
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
        hidden, state = model.hidden(
            ids.to(device)[None], state, seqs=Sequences.from_lengths(lengths, device)
        )
        end = 0
        for i, n in enumerate(lengths):
            end, at[i] = end + n, at[i] + n
            if n and at[i] == rows[i].shape[0]:
                last[i] = hidden[0, end - 1].clone()
    if state is None:
        raise StateError(f"{type(model).__name__} carries no state, so it cannot generate token by token")
    return model.logits(torch.stack([h for h in last if h is not None])), state


def _check_prompts(prompts: Sequence[Sequence[int] | Tensor], vocab_size: int) -> list[Tensor]:
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


def _device_of(model: Any) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, for as long as it takes; each module gets back the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

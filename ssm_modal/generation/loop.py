"""Generation: prompts of unequal length read end to end, then one step a token through the carried state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssm_modal.generation.config import GenerationConfig
from ssm_modal.generation.decode import Decoder
from ssm_modal.generation.prompts import CausalModel, check_prompts, device_of, evaluating, read_prompts
from ssm_modal.generation.sampling import NO_TOKEN
from ssm_modal.generation.stopping import RowText
from ssm_modal.state import State
from ssm_modal.tokenizers.base import TextTokenizer

Finish = Literal["length", "eos", "stop"]


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
    rows = check_prompts(prompts, model.config.vocab_size)
    if tokenizer is None and (config.stop or on_text is not None):
        what = "stop" if config.stop else "on_text"
        raise ValueError(f"{what} is given without a tokenizer, which is needed to turn tokens into text")
    with evaluating(model):
        return _Run(model, rows, config, tokenizer, on_token, on_text, return_states).run(state)


class _Run:
    """One call of `generate`."""

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
        self.device = device_of(model)
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
        self.seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self.seen = torch.zeros(len(rows), self.limit, dtype=torch.bool)
            for row, ids in enumerate(rows):
                self.seen[row, ids[ids < self.limit]] = True
            self.seen = self.seen.to(self.device)
        # Where something hangs on each token, the host looks at each; no row's state may run past its end.
        told = on_token is not None or on_text is not None or bool(config.stop)
        self.one_by_one = told or (return_states and self.eos_id is not None)

    def run(self, state: State | None) -> GenerationResult:
        logits, state = read_prompts(self.model, self.rows, state, self.config.prefill_tokens)
        decoder = Decoder(
            self.model, logits, state, self.config, self.generators, seen=self.seen, limit=self.limit
        )
        rest = self.config.max_new_tokens
        while rest:
            n = min(1 if self.one_by_one else decoder.most, rest)
            rest -= n
            going = self._take(decoder, decoder.take(n))
            if not going:
                break
            if len(going) < len(decoder.rows):
                decoder.keep(going)
        return GenerationResult(
            self.tokens,
            [f for f in self.finish if f is not None],
            None if self.texts is None else [row.text for row in self.texts],
            None if self.states is None else [s for s in self.states if s is not None],
        )

    def _take(self, decoder: Decoder, taken: list[list[int]]) -> list[int]:
        """Note the tokens of each of the decoder's rows; returns the places there of the rows that go on."""
        going = []
        for at, (row, tokens) in enumerate(zip(decoder.rows, taken)):
            for token in tokens:
                if self.finish[row] is None:
                    self._note(row, token, at, decoder.state)
            if self.finish[row] is None:
                going.append(at)
        return going

    def _note(self, row: int, token: int, at: int, state: State) -> None:
        if token == NO_TOKEN:
            raise RuntimeError(
                f"the model's logits for row {row} hold NaN or leave no token, after "
                f"{len(self.tokens[row])} new tokens; its weights are damaged or "
                "its dtype is too narrow (try float32)"
            )
        if token == self.eos_id:
            self._end(row, "eos", at, None, state)
            return
        self.tokens[row].append(token)
        if self.on_token is not None:
            self.on_token(row, token)
        if self.texts is not None:
            self._emit(row, self.texts[row].push(token))
        if self.texts is not None and self.texts[row].stopped:
            self._end(row, "stop", at, token, state)
        elif len(self.tokens[row]) >= self.config.max_new_tokens:
            self._end(row, "length", at, token, state)

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

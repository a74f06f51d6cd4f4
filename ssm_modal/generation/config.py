"""How tokens are chosen and when generation stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of `generate`; each is checked here.

    max_new_tokens: tokens to add to each prompt at most, 1 or more.
    temperature: the logits are divided by it; 0 takes the likeliest token always (greedy).
    top_k: sample among the k likeliest tokens (and those as likely as the k-th); None: among all.
    top_p: sample among the fewest tokens whose probabilities reach it together, in (0, 1]; 1 leaves all
        (nucleus sampling, arXiv 1904.09751).
    min_p: sample among the tokens at least min_p times as likely as the likeliest, in [0, 1]; 0 leaves all
        (arXiv 2407.01082).
    repetition_penalty: logits of tokens that the prompt or the text so far holds are divided by it where
        positive and multiplied where negative (CTRL, arXiv 1909.05858); 1 does nothing, more discourages.
    stop: texts that end a row; they and all behind them are cut from its text. Needs a tokenizer.
    eos_id: the token that ends a row; None: the tokenizer's, if one is given and has one.
    stop_at_eos: whether that token ends a row at all.
    suppress_tokens: ids that are never chosen.
    seed: row i draws from a generator of its own, seeded with seed + i, so no row depends on the others; None
        takes a fresh seed from torch's global generator.
    prefill_tokens: prompt tokens read at once, of all rows together; bounds the memory that long prompts
        take.
    cuda_graph: on CUDA, run a decode step as one graph; False launches its kernels one by one, for debugging.

    The order is: suppressed tokens, penalty, temperature, top-k, top-p, min-p. Raises TypeError or ValueError
    naming the setting.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    eos_id: int | None = None
    stop_at_eos: bool = True
    suppress_tokens: tuple[int, ...] = ()
    seed: int | None = None
    prefill_tokens: int = 8192
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("prefill_tokens", self.prefill_tokens, 1)
        _number("temperature", self.temperature, "0 or more", lambda v: v >= 0)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        _number("top_p", self.top_p, "more than 0 and at most 1", lambda v: 0 < v <= 1)
        _number("min_p", self.min_p, "at least 0 and at most 1", lambda v: 0 <= v <= 1)
        _number("repetition_penalty", self.repetition_penalty, "more than 0", lambda v: v > 0)
        if isinstance(self.stop, str):
            raise TypeError(f"stop is the string {self.stop!r}, expected a tuple of strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        for text in self.stop:
            if not isinstance(text, str):
                raise TypeError(f"stop holds {text!r}, expected strings")
            if not text:
                raise ValueError("stop holds an empty string, expected texts of at least one character")
        if self.eos_id is not None:
            _whole("eos_id", self.eos_id, 0)
        object.__setattr__(self, "suppress_tokens", tuple(self.suppress_tokens))
        for token in self.suppress_tokens:
            _whole("suppress_tokens", token, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
            if self.seed >= 1 << 62:
                raise ValueError(f"seed is {self.seed}, expected less than 2^62")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a whole number of {least} or more")
    if value < least:
        raise ValueError(f"{name} is {value}, expected {least} or more")


def _number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, expected a number, {expected}")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name} is {value}, expected {expected}")

"""Recordings from a model of mu-law ids: from a begin id to the end id that the model chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ssm_modal.generation.config import GenerationConfig
from ssm_modal.generation.loop import generate
from ssm_modal.generation.prompts import CausalModel
from ssm_modal.tokenizers.waveform import MuLawTokenizer


@dataclass(frozen=True)
class GeneratedWaveform:
    """waveform: (n,) float32, n from 0. finish: "end" where the model ended it, "length" where it was cut."""

    waveform: Tensor
    finish: Literal["end", "length"]


def generate_waveforms(
    model: CausalModel,
    tokenizer: MuLawTokenizer,
    labels: Sequence[str | None],
    config: GenerationConfig,
) -> list[GeneratedWaveform]:
    """One recording a label, all in one batch, nothing rejected.

    labels: classes of the tokenizer, None for a recording without one. config: `max_new_tokens` counts
    samples (an end that would come right behind them is not seen); which ids end a recording or may not
    follow a sample comes from the tokenizer.

    Raises ValueError for a label that the tokenizer does not know, and as `generate`.
    """
    size = int(model.config.vocab_size)
    if tokenizer.vocab_size > size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, but the model knows {size}")
    never = (*tokenizer.begin_ids, *range(tokenizer.vocab_size, size))
    config = replace(config, eos_id=tokenizer.end_id, stop_at_eos=True, suppress_tokens=never)
    result = generate(model, [[tokenizer.begin_id_of(label)] for label in labels], config)
    return [
        GeneratedWaveform(tokenizer.decode(ids), "end" if why == "eos" else "length")
        for ids, why in zip(result.tokens, result.finish)
    ]

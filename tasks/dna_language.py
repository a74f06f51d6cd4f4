"""Causal language modelling of DNA: the loss of `LanguageModelling`, and the test by length of context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssm_modal.models import CausalLM
from ssm_modal.tasks.base import (
    DEFAULT_OPTIMIZER,
    DEFAULT_SCHEDULE,
    InitPart,
    OptimizerConfig,
    Recompute,
    ScheduleConfig,
)
from ssm_modal.tasks.context import evaluate_context, write_context
from ssm_modal.tasks.language import LanguageModelling


class DNALanguageModelling(LanguageModelling):
    """Next-token prediction of DNA, tested at several lengths of context.

    Beside what `LanguageModelling` logs, a test (`ssm-modal test`, or `fit` when it has ended) scores the
    whole test split by windows of each of `context_lengths` (`ssm_modal.tasks.context` says what that means),
    logs `test/nats_per_base_<length>` and writes `context.csv`, `context_records.csv` and
    `context_places.csv` into the run's folder.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part, segment, recompute, input_noise: see
            `LanguageModelling`; `segment` goes for the test by length too.
        context_lengths: tokens a window, each 1 or more; empty for no such test.
        context_tokens: tokens of all windows that go through the model at once in that test, unless one
            window alone has more.
    """

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: InitPart = "all",
        input_noise: float = 0.0,
        segment: int | None = None,
        recompute: Recompute = "none",
        context_lengths: Sequence[int] = (),
        context_tokens: int = 1 << 17,
    ) -> None:
        super().__init__(
            model,
            overrides,
            optimizer,
            schedule,
            init_from,
            init_part,
            input_noise=input_noise,
            segment=segment,
            recompute=recompute,
        )
        if not isinstance(self.model, CausalLM):
            raise ValueError(f"model is {model!r}, expected a causal one, such as dna_lm")
        for length in context_lengths:
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise ValueError(f"context_lengths holds {length!r}, expected whole numbers of 1 or more")
        if context_tokens < 1:
            raise ValueError(f"context_tokens is {context_tokens}, expected 1 or more")
        self.context_lengths, self.context_tokens = tuple(context_lengths), context_tokens

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        out = super().derived_metrics(stage, means)
        if stage == "test" and self.context_lengths:
            out |= self._by_context()
        return out

    def _by_context(self) -> dict[str, float]:
        """Every process computes the same; the first writes the tables."""
        data: Any = self._datamodule
        if not callable(getattr(data, "window_batches", None)):
            raise ValueError(
                f"context_lengths is {list(self.context_lengths)}, but {type(data).__name__} has no "
                "window_batches(split, length, batch_size); set context_lengths: []"
            )
        results = []
        for length in self.context_lengths:
            with self.trainer.precision_plugin.forward_context():
                results.append(
                    evaluate_context(
                        self.model,
                        data,
                        length,
                        tokens=self.context_tokens,
                        segment=self.segment,
                        device=self.device,
                    )
                )
        if self.trainer.is_global_zero:
            write_context(self.run_dir, results, data.record_names())
        return {f"nats_per_base_{r.length}": r.nats_per_base for r in results}

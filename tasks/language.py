"""Causal language modelling: next-token loss in nats, perplexity, bits a byte, and the streamed loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ssm_modal.tasks.base import (
    DEFAULT_OPTIMIZER,
    DEFAULT_SCHEDULE,
    IGNORE,
    OptimizerConfig,
    ScheduleConfig,
    StepOutput,
    TrainingTask,
    token_loss,
)


class LanguageModelling(TrainingTask):
    """Next-token prediction.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part: as for `TrainingTask`.
        stream: when to take, beside the loss over windows, the streamed loss: the whole validation text in one pass
            with the state carried, so that every token but the first is predicted from all text before it. "off",
            "validate" (each validation) or "test" (`ssm-modal test`, and after training). Needs a data module with
            `stream(split)`.

    Logs `train/loss`, and under `val/` or `test/`: `loss` (nats a token, the mean over all targets), `perplexity`,
    `bits_per_byte` where the data module says how many bytes a token stands for (`bytes_per_token`), and
    `stream_loss`, `stream_bits_per_byte` of the streamed pass.
    """

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: Literal["all", "backbone"] = "all",
        stream: Literal["off", "validate", "test"] = "off",
    ) -> None:
        super().__init__(model, overrides, optimizer, schedule, init_from, init_part)
        if stream not in ("off", "validate", "test"):
            raise ValueError(f"stream is {stream!r}, expected off, validate or test")
        self.stream = stream

    def step(self, batch: Mapping[str, Any], stage: str) -> StepOutput:
        return StepOutput(*token_loss(self.logits(batch), batch["labels"]))

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        if "loss" not in means:
            return {}
        out = {"perplexity": _exp(means["loss"])}
        split = "val" if stage == "val" else "test"
        bytes_per_token = self._bytes_per_token(split)
        if bytes_per_token is not None:
            out["bits_per_byte"] = means["loss"] / math.log(2) / bytes_per_token
        if self.stream == {"val": "validate", "test": "test"}[stage] and not self.trainer.sanity_checking:
            streamed = self.streamed_loss(split)
            out["stream_loss"] = streamed
            if bytes_per_token is not None:
                out["stream_bits_per_byte"] = streamed / math.log(2) / bytes_per_token
        return out

    @torch.no_grad()
    def streamed_loss(self, split: str = "val") -> float:
        """Nats a token over the whole text of `split`, read in segments with the state carried between them.

        The data module's `stream(split)` yields batches of one row, `ids` and `labels` (1, segment), in the order of
        the text. Memory does not grow with the text for a state-space model; a Transformer's cache does.
        """
        source = getattr(getattr(self.trainer, "datamodule", None), "stream", None)
        if source is None:
            raise ValueError(
                f"stream is {self.stream!r}, but {type(getattr(self.trainer, 'datamodule', None)).__name__} has no "
                "stream(split); set stream: off"
            )
        total, count, state = 0.0, 0, None
        for batch in source(split):
            ids, labels = batch["ids"].to(self.device), batch["labels"].to(self.device)
            logits, state = self.model(ids, state)
            nats, targets = token_loss(logits, labels)
            total, count = total + float(nats), count + int(targets)
        return total / count if count else math.nan

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`ids`, `labels` and `nats`, all (batch, length) on the host: the loss of each target, 0 where none is."""
        logits, labels = self.logits(batch), batch["labels"]
        nats = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return {"ids": batch["ids"].cpu(), "labels": labels.cpu(), "nats": nats.view(labels.shape).cpu()}

    def _bytes_per_token(self, split: str) -> float | None:
        """Bytes of text a token of `split` stands for, as the data module says; None where it does not."""
        ask = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        return float(ask(split) if callable(ask) else ask) if ask is not None else None


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf

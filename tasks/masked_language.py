"""Masked language modelling: what stands at hidden places, in nats and right predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.errors import ConfigError
from ssm_modal.models import MaskedLM
from ssm_modal.tasks.base import (
    DEFAULT_OPTIMIZER,
    DEFAULT_SCHEDULE,
    IGNORE,
    InitPart,
    OptimizerConfig,
    Recompute,
    ScheduleConfig,
    StepOutput,
    TrainingTask,
    token_loss,
)
from ssm_modal.tasks.language import nats_per_base, safe_exp


class MaskedLanguageModelling(TrainingTask):
    """Predict the tokens at masked places (BERT, arXiv 1810.04805; of DNA with Caduceus, arXiv 2403.03234).

    A batch: `ids` (batch, length) int64, what the model is given, with masks in it, and `labels` likewise,
    the token at a chosen place and -100 elsewhere; or both (1, total) packed by `cu_seqlens`. Logits are
    computed at chosen places alone, the loss in fp32.

    Logs `train/loss`, and under `val/` or `test/`: `loss` (nats a chosen token, the mean over all of them),
    `perplexity`, `accuracy` (the share of chosen tokens predicted right), and `nats_per_base` where the data
    module has `bases_per_token`.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part, recompute: see `TrainingTask`; the model
            is a masked one, such as `caduceus_ps`.
    """

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: InitPart = "all",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__(model, overrides, optimizer, schedule, init_from, init_part, recompute)
        if not isinstance(self.model, MaskedLM):
            raise ConfigError(
                f"model is {model!r}, a {type(self.model).__name__}; expected a masked one: caduceus_ps, "
                "caduceus_ph or another MaskedLM"
            )

    def check_data(self, data: Any) -> None:
        """Raise ValueError where the data module does not mask, or has ids the model cannot take."""
        super().check_data(data)
        objective = getattr(data, "objective", "masked")
        if objective != "masked":
            raise ValueError(
                f"the data's objective is {objective!r}, but the model predicts what is masked; set "
                "data.init_args.objective to masked"
            )

    def step(self, batch: Mapping[str, Any], stage: str) -> StepOutput:
        """The summed cross-entropy at the chosen places; in evaluation what was right too."""
        logits, labels = self._at_chosen(batch)
        loss, count = token_loss(logits, labels)
        if stage == "train":
            return StepOutput(loss, count)
        return StepOutput(loss, count, {"accuracy": ((logits.argmax(-1) == labels).sum(), count)})

    def _at_chosen(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits (chosen, vocab_size) and labels (chosen,) in the order of the batch's rows."""
        model, labels = self.model, batch["labels"]
        assert isinstance(model, MaskedLM)
        if labels.shape != batch["ids"].shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(batch['ids'].shape)}, that of ids"
            )
        hidden, _ = model.hidden(batch["ids"], seqs=batch.get("seqs"))
        chosen = labels != IGNORE
        return model.logits(hidden[chosen]), labels[chosen]

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        if "loss" not in means or math.isnan(means["loss"]):
            return {}
        out = {"perplexity": safe_exp(means["loss"])}
        return out | nats_per_base(means["loss"], getattr(self.trainer, "datamodule", None))

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`ids`, `labels` and `nats`, (batch, length) on the host: each chosen token's loss, 0 elsewhere."""
        logits, labels = self._at_chosen(batch)
        nats = torch.zeros(batch["labels"].shape, dtype=torch.float32, device=logits.device)
        nats[batch["labels"] != IGNORE] = F.cross_entropy(logits.float(), labels, reduction="none")
        return {"ids": batch["ids"].cpu(), "labels": batch["labels"].cpu(), "nats": nats.cpu()}

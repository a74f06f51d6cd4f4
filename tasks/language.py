"""Causal language modelling: next-token loss in nats, perplexity, bits a byte, and the streamed loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ssm_modal.heads import long_token_loss, long_token_nats
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


class LanguageModelling(TrainingTask):
    """Next-token prediction.

    Args:
        model, overrides, optimizer, schedule, init_from, init_part, recompute: as for `TrainingTask`; with
            recompute "blocks" the full logits never exist either.
        segment: tokens of a sequence that go through the model at once in training, validation and tests;
            None for the whole. Training is exact over any length in the memory of one segment: states are
            carried forward, segments computed again for their gradients
            (`ssm_modal.backbone.sum_over_segments`), and the loss taken a piece at a time. Attention is exact
            too, but its cache is kept once a segment.
        stream: when to take the streamed loss beside the loss over windows: the whole text in one pass with
            the state carried, so that every token is predicted from all text before it. "off", "validate"
            (each validation) or "test" (`ssm-modal test`, and after training). Needs a data module with
            `stream(split)`: all ids of "validation" or "test" in order (tokens,).
        stream_segment: tokens that go through the model at once in the streamed pass.
        input_noise: in training, the share of input ids replaced by ids drawn uniformly from the vocabulary;
            the labels stay. A regulariser for small texts (data noising, Xie et al., arXiv 1703.02573, with
            the uniform in place of the unigram distribution).

    Logs `train/loss`, and under `val/` or `test/`: `loss` (nats a token, the mean over all targets),
    `perplexity`, `bits_per_byte` where the data module has `bytes_per_token(split)`, `nats_per_base` where it
    has `bases_per_token`, and `stream_loss` and `stream_bits_per_byte` of the streamed pass. Where it has
    `sample_levels` (ids below it stand for samples of a waveform, others for begin and end):
    `bits_per_sample`, the bits of all samples over their number; `bits_per_end`, those of an end;
    `bits_per_sample_with_end`, all bits over the number of samples.
    """

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: InitPart = "all",
        stream: Literal["off", "validate", "test"] = "off",
        stream_segment: int = 4096,
        input_noise: float = 0.0,
        segment: int | None = None,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__(model, overrides, optimizer, schedule, init_from, init_part, recompute)
        self.check_segment("segment", segment)
        self.segment = segment
        if stream not in ("off", "validate", "test"):
            raise ValueError(f"stream is {stream!r}, expected off, validate or test")
        if stream_segment < 1:
            raise ValueError(f"stream_segment is {stream_segment}, expected 1 or more")
        if not 0 <= input_noise < 1:
            raise ValueError(f"input_noise is {input_noise}, expected 0 or more and below 1")
        self.stream, self.stream_segment, self.input_noise = stream, stream_segment, input_noise

    def check_data(self, data: Any) -> None:
        """Raise ValueError where the data module masks, or has ids the model cannot take."""
        super().check_data(data)
        objective = getattr(data, "objective", "causal")
        if objective != "causal":
            raise ValueError(
                f"the data's objective is {objective!r}, but the model predicts the next token; set "
                "data.init_args.objective to causal"
            )

    def step(self, batch: Mapping[str, Any], stage: str) -> StepOutput:
        if stage == "train" and self.input_noise:
            batch = {**batch, "ids": self._noised(batch["ids"])}
        levels = getattr(getattr(self._trainer, "datamodule", None), "sample_levels", None)
        if stage != "train" and levels is not None:
            return _waveform_bits(self._target_nats(batch), batch["labels"], levels)
        if self.segment is None and self.recompute == "none":
            return StepOutput(*token_loss(self.logits(batch), batch["labels"]))
        model: Any = self.model
        loss, count = long_token_loss(
            model, batch["ids"], batch["labels"], segment=self.segment, seqs=batch.get("seqs")
        )
        return StepOutput(loss, count)

    def _noised(self, ids: Tensor) -> Tensor:
        """`ids` with a share of `input_noise` drawn anew."""
        drawn = torch.randint_like(ids, self.hparams["model_config"]["vocab_size"])
        return torch.where(torch.rand(ids.shape, device=ids.device) < self.input_noise, drawn, ids)

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        if "loss" not in means:
            return {}
        out = {"perplexity": safe_exp(means["loss"])} | nats_per_base(means["loss"], self._datamodule)
        split = "validation" if stage == "val" else "test"
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
    def streamed_loss(self, split: str = "validation") -> float:
        """Nats a token over the whole text of `split`, read in segments with the state carried between them.

        Memory does not grow with the text for a state-space model; a Transformer's cache does. Every process
        computes the same value.
        """
        total, count, state = 0.0, 0, None
        for ids, labels in self._segments(split):
            logits, state = self.model(ids.to(self.device), state)
            nats, targets = token_loss(logits, labels.to(self.device))
            total, count = total + float(nats), count + int(targets)
        return total / count if count else math.nan

    def _segments(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The text of `split` in order as ids and labels (1, segment)."""
        ask = getattr(self._datamodule, "stream", None)
        if ask is None:
            raise ValueError(
                f"stream is {self.stream!r}, but {type(self._datamodule).__name__} has no stream(split) that "
                "gives a split in order; set stream: off"
            )
        whole = ask(split)
        last = whole.shape[0] - 1
        for start in range(0, last, self.stream_segment):
            window = whole[start : min(start + self.stream_segment, last) + 1].to(torch.int64)[None]
            yield window[:, :-1], window[:, 1:]

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`ids`, `labels` and `nats`, (batch, length) on the host: each target's loss, 0 where none is."""
        nats = self._target_nats(batch)
        return {"ids": batch["ids"].cpu(), "labels": batch["labels"].cpu(), "nats": nats.cpu()}

    def _target_nats(self, batch: Mapping[str, Any]) -> Tensor:
        """Each target's loss in nats, 0 where there is none: (batch, length)."""
        labels = batch["labels"]
        if self.segment is not None or self.recompute != "none":
            model: Any = self.model
            segment = self.segment or max(1, labels.shape[1])
            return long_token_nats(model, batch["ids"], labels, segment=segment, seqs=batch.get("seqs"))
        nats = torch.nn.functional.cross_entropy(
            self.logits(batch).float().flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORE,
            reduction="none",
        )
        return nats.view(labels.shape)

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _bytes_per_token(self, split: str) -> float | None:
        """Bytes of text that a token of `split` stands for on average; None where the data does not say."""
        ask = getattr(self._datamodule, "bytes_per_token", None)
        return float(ask(split)) if callable(ask) else None


def _waveform_bits(nats: Tensor, labels: Tensor, levels: int) -> StepOutput:
    """The loss of every target, and in bits apart for samples (labels below `levels`) and what ends them."""
    bits = nats.double() / math.log(2)
    sample, end = (labels >= 0) & (labels < levels), labels >= levels
    sums = {
        "bits_per_sample": (bits[sample].sum(), sample.sum()),
        "bits_per_end": (bits[end].sum(), end.sum()),
        "bits_per_sample_with_end": (bits.sum(), sample.sum()),
    }
    return StepOutput(nats.double().sum(), (labels != IGNORE).sum(), sums)


def safe_exp(nats: float) -> float:
    """exp(nats), infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def nats_per_base(nats: float, data: Any) -> dict[str, float]:
    """`nats` a token as nats a base, where the data module says what a token stands for."""
    bases = getattr(data, "bases_per_token", None)
    return {"nats_per_base": nats / bases} if isinstance(bases, int) else {}

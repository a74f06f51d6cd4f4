"""What a model of waveforms sounds like while it trains, in TensorBoard."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ssm_modal.generation import GenerationConfig
from ssm_modal.generation.waveforms import generate_waveforms
from ssm_modal.io.log_mel import log_mel
from ssm_modal.tokenizers import MuLawTokenizer


class LogAudio(Callback):
    """Generates at validations and writes audio and log-mel spectrograms to TensorBoard, as
    `generated/LABEL`; beside them once a validation recording of each label, as `real/LABEL`.

    Args:
        every_n_validations: generate at every so many validations; the check before training is none.
        labels: classes to generate; None: the first four the data has, or one recording without a class.
        seconds: where a recording is cut.
        temperature: as of `GenerationConfig`.
        seed: recording i draws from seed + i each time, so that what changes is the model.

    The data module must have `tokenizer`, a `MuLawTokenizer` with its sample rate, and `clips(split)`.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        labels: list[str] | None = None,
        seconds: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations is {every_n_validations}, expected 1 or more")
        if not seconds > 0:
            raise ValueError(f"seconds is {seconds}, expected more than 0")
        self.every_n_validations, self.labels, self.seconds = every_n_validations, labels, seconds
        self.temperature, self.seed = temperature, seed
        self._validations = 0

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if not isinstance(tokenizer, MuLawTokenizer):
            raise ValueError("LogAudio: the data has no tokenizer of waveforms, expected layout windows")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_validation_end: by then WeightAverage has put the weights in the average's place again.
        boards = [one.experiment for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if not boards or not trainer.is_global_zero or self._validations % self.every_n_validations:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer: MuLawTokenizer = data.tokenizer
        labels: list[str | None] = [*(self.labels or tokenizer.classes[:4] or (None,))]
        assert tokenizer.sample_rate is not None
        config = GenerationConfig(
            max_new_tokens=max(1, round(self.seconds * tokenizer.sample_rate)),
            temperature=self.temperature,
            seed=self.seed,
        )
        made = generate_waveforms(pl_module.model, tokenizer, labels, config)  # type: ignore[arg-type]
        named = {f"generated/{label}": one.waveform for label, one in zip(labels, made)}
        if self._validations == self.every_n_validations:
            for label in labels:
                real = [c for c in data.clips("validation") if label in (None, c.recording.label)]
                if real:
                    named[f"real/{label}"] = real[0].read()
        for name, waveform in named.items():
            for board in boards:
                _add(board, name, waveform, trainer.global_step, tokenizer.sample_rate)


def _add(board: Any, name: str, waveform: Tensor, step: int, sample_rate: int) -> None:
    if not waveform.shape[0]:
        waveform = torch.zeros(1)  # it ended before its first sample
    board.add_audio(name, waveform[None], step, sample_rate=sample_rate)
    picture = log_mel(waveform, sample_rate).flip(0)  # low bands at the bottom
    low, high = picture.min(), picture.max()
    board.add_image(f"{name}/log_mel", ((picture - low) / (high - low).clamp(min=1e-6))[None], step)

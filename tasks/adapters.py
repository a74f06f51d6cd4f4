"""Fine-tuning a published or saved language model with a LoRA adapter; checkpoints hold the adapter alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

import ssm_modal
from ssm_modal.checkpoints.adapters import LoraSettings, add_lora, save_adapter
from ssm_modal.models import CausalLM
from ssm_modal.tasks.base import (
    DEFAULT_OPTIMIZER,
    DEFAULT_SCHEDULE,
    OptimizerConfig,
    Recompute,
    ScheduleConfig,
)
from ssm_modal.tasks.language import LanguageModelling

DEFAULT_LORA = LoraSettings()


class AdapterTuning(LanguageModelling):
    """`LanguageModelling` of a model from `ssm_modal.load_pretrained`, of which only an adapter is trained.

    Args:
        pretrained: the model's folder, or the id of a Hugging Face repository.
        lora: the adapter.
        quantize: "int8" or "int4" packs the frozen weights (QLoRA); null keeps them.
        optimizer, schedule, stream, stream_segment, segment, recompute: as for `LanguageModelling`.

    Checkpoints hold the adapter alone, and the run's folder gets `adapter/` as peft writes one, when training
    ends. `ssm_modal.checkpoints.adapters.load_adapter(model, ...)` takes either.
    """

    def __init__(
        self,
        pretrained: str,
        lora: LoraSettings = DEFAULT_LORA,
        quantize: Literal["int8", "int4"] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        stream: Literal["off", "validate", "test"] = "off",
        stream_segment: int = 4096,
        segment: int | None = None,
        recompute: Recompute = "none",
    ) -> None:
        self._quantize = quantize
        super().__init__(
            pretrained,
            optimizer=optimizer,
            schedule=schedule,
            stream=stream,
            stream_segment=stream_segment,
            segment=segment,
            recompute=recompute,
        )
        self._lora = add_lora(self.model, lora)
        self.save_hyperparameters({"lora": dataclasses.asdict(lora)})
        # The frozen weights are not in a checkpoint.
        self.strict_loading = False

    def make_model(self, name: str, overrides: dict[str, Any]) -> nn.Module:
        """The model at `name`, a place of `load_pretrained`; Lightning moves it to the device."""
        model = ssm_modal.load_pretrained(name, quantize=self._quantize)
        if not isinstance(model, CausalLM):
            raise ValueError(f"pretrained is a {type(model).__name__}, expected a causal language model")
        return model.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        tensors = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: t for name, t in tensors.items() if "lora_" in name}

    @rank_zero_only
    def on_train_end(self) -> None:
        """Write the adapter as peft does, into a folder that a resumed run replaces."""
        target = Path(self.trainer.default_root_dir) / "adapter"
        for file in target.glob("adapter_*") if target.is_dir() else ():
            file.unlink()
        save_adapter(self.model, self._lora, target)

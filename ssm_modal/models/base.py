"""What every model has: a config that rebuilds it, and saving in the package's own format."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ssm_modal.backbone import BackboneBase, BackboneBaseConfig
from ssm_modal.io.atomic import put_in_place, write_aside
from ssm_modal.layers.config import Config
from ssm_modal.layers.quantized import is_quantized

FORMAT = "ssm_modal"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ModelConfig(Config):
    """Base of the models' configs: a `backbone` beside what the model adds."""

    @property
    def backbone_config(self) -> BackboneBaseConfig:
        """The config of the model's backbone."""
        raise NotImplementedError(f"{type(self).__name__} has no backbone")

    def build(self) -> Model:
        """A freshly initialised model of this config."""
        raise NotImplementedError(f"{type(self).__name__} describes no model")


class Model(nn.Module):
    """Base of all models: a plain module with a `config` and a `backbone`."""

    config: ModelConfig
    backbone: BackboneBase

    @property
    def token_embedding(self) -> nn.Embedding | None:
        """The embedding of token ids, None where the model reads something else."""
        return None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into `folder`, made if needed.

        Each file is written whole under a temporary name and then renamed, so that a full disk or a kill
        leaves what was there. A weight used in two places is stored once. Nothing is pickled. Raises
        ValueError for a model with quantised weights.
        """
        check_dense(self)
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"save_pretrained: {target} is a file, expected a folder")
        tensors = unique_tensors(self.state_dict())
        text = json.dumps(config_document(self.config), indent=2) + "\n"
        weights, config = target / WEIGHTS_FILE, target / CONFIG_FILE
        # Both are complete on the disk before either old file is replaced.
        aside = write_aside(weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        try:
            put_in_place(write_aside(config, lambda path: path.write_text(text, encoding="utf-8")), config)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
        put_in_place(aside, weights)


def check_dense(model: nn.Module) -> None:
    """Raise ValueError for a model with quantised weights, which no format here has a place for."""
    if is_quantized(model):
        raise ValueError(
            "the model's weights are quantised, which is done in loading and not written; save the model "
            "that they were quantised from"
        )


def config_document(config: ModelConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict()}


def unique_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as safetensors needs it: every memory under one name, every tensor contiguous."""
    seen: set[tuple[Any, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.detach().contiguous()
    return kept

"""Models back from the package's own folders and from checkpoints of training runs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssm_modal.backbone import BackboneBase
from ssm_modal.checkpoints.locate import locate
from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.models.base import CONFIG_FILE, FORMAT, FORMAT_VERSION, WEIGHTS_FILE, Model, ModelConfig

PREFIX = "model."  # what a training run's keys begin with


@overload
def load_pretrained(
    path: str | os.PathLike[str],
    part: None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model: ...
@overload
def load_pretrained(
    path: str | os.PathLike[str],
    part: Literal["backbone"],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BackboneBase: ...
def load_pretrained(
    path: str | os.PathLike[str],
    part: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model | BackboneBase:
    """The model (in eval mode) that was saved or trained at `path`, with its weights.

    Args:
        path: a folder written by `save_pretrained`; the folder of a training run (its best checkpoint, else
            its last); a .ckpt file of one; or the id of a Hugging Face repository that holds the first.
        part: None for the whole model, "backbone" for its backbone alone.
        device: where the weights go; None for the CPU.
        dtype: what the weights are cast to; None keeps what was saved. `A_log`, `D` and `dt_bias` stay fp32.

    Raises:
        CheckpointError: nothing found there, a file cut short or of another format, or weights that do not
            fit the architecture; missing, unexpected and mis-shaped ones are listed.
        ValueError: an unknown `part`.
    """
    if part not in (None, "backbone"):
        raise ValueError(f"load_pretrained: part is {part!r}, expected None or 'backbone'")
    found = locate(path)
    plain, tensors = _read_ckpt(found) if found.is_file() else _read_folder(found)
    try:
        config: ModelConfig = ModelConfig.from_dict(plain)
        # On meta nothing is allocated, and the caller's random numbers are left as they are.
        with torch.device("meta"):
            model: Model | BackboneBase = config.build() if part is None else config.backbone_config.build()
    except ConfigError as error:
        raise CheckpointError(f"{found}: the config is not one of this version's: {error}") from error
    if part == "backbone":
        tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    check_fit(model, tensors, str(found))
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    return model.to(device=device or "cpu", dtype=dtype).eval()


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError unless `tensors` have the names and shapes of `model`'s state dict.

    `source` is what the error calls the place they come from.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(want.shape)}"
        for name, want in expected.items()
        if name in tensors and tensors[name].shape != want.shape
    ]
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}; {'; '.join(problems)}")


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_folder(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The plain config and the tensors of a folder written by `save_pretrained`."""
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        other = (
            document.get("model_type") or document.get("architectures")
            if isinstance(document, dict)
            else None
        )
        hint = f" (it describes {other!r})" if other else ""
        raise CheckpointError(
            f"{path} is no config of {FORMAT}: expected the key 'format' to be {FORMAT!r}{hint}"
        )
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {document.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "it was written by another version of the package"
        )
    if not isinstance(document.get("config"), dict):
        raise CheckpointError(f"{path} has no model config under the key 'config'")
    weights = folder / WEIGHTS_FILE
    try:
        return document["config"], load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{weights} cannot be read; it may be cut short or no safetensors file: {error}"
        ) from error


def _read_ckpt(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The plain config and the tensors of a training run's checkpoint; runs no code from the file."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read; it may be cut short or no checkpoint: {error}"
        ) from error
    hyper = data.get("hyper_parameters") if isinstance(data, dict) else None
    if not isinstance(hyper, Mapping) or not isinstance(data.get("state_dict"), Mapping):
        raise CheckpointError(
            f"{path} is no checkpoint of a training run: no state_dict or no hyper_parameters in it"
        )
    plain = hyper.get("model_config")
    if not isinstance(plain, Mapping):
        raise CheckpointError(
            f"{path} has no model_config among its hyper_parameters, so the model cannot be rebuilt"
        )
    tensors = {}
    for key, value in data["state_dict"].items():
        name = key.replace("_orig_mod.", "")  # torch.compile's
        if name.startswith(PREFIX) and isinstance(value, Tensor):
            # Out of the mapped file: it may be replaced while the model lives.
            tensors[name.removeprefix(PREFIX)] = value.clone()
    return plain, tensors

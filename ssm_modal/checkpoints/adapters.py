"""LoRA adapters (arXiv 2106.09685) by peft, in place: the model keeps its class, so it trains, streams and
generates as before. Needs the extra "adapters"."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssm_modal.checkpoints.fit import check_shapes
from ssm_modal.checkpoints.weights import read_torch_file
from ssm_modal.errors import CheckpointError, nearest
from ssm_modal.io.atomic import new_folder
from ssm_modal.layers.moe import Experts
from ssm_modal.layers.quantized import QuantizedExperts, QuantizedLinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NAME = "default"  # peft's name of the only adapter
PREFIX = "base_model.model."  # of every key in peft's files
EXPERTS = "experts"


@dataclass(frozen=True)
class LoraSettings:
    """rank: of each update. alpha: updates are scaled by alpha / rank. dropout: on what goes into the update;
    0 where experts are adapted, whose stacked weights cannot have it. targets: names of linear layers, and
    "experts" for both stacks of a mixture; None for every one that the backbone has."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}, expected 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}, expected above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, expected 0 or more and below 1")


def add_lora(model: nn.Module, settings: LoraSettings | None = None) -> Any:
    """Put an adapter on the projections of `model`, in place; everything else stops training.

    It starts as no change: B is zero. Weights packed in 8 or 4 bits are adapted too (QLoRA, arXiv
    2305.14314); packed experts are not. Returns peft's `LoraConfig`. Raises ValueError for targets that
    are not there, for dropout with experts, and for a model that has an adapter.
    """
    settings = settings or LoraSettings()
    found = dict.fromkeys(name for name, _ in _targets(model))
    wanted = tuple(found) if settings.targets is None else tuple(settings.targets)
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"lora.targets holds {name!r}, which the model does not have; {nearest(name, found)}"
            )
    if not wanted:
        raise ValueError("the model has no linear layer in its backbone to adapt")
    stacks = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.out_proj"]
    packed = any(isinstance(module, QuantizedExperts) for module in model.modules())
    if EXPERTS in wanted and settings.dropout:
        raise ValueError(
            f"lora.dropout is {settings.dropout}, expected 0 with experts, or lora.targets without experts"
        )
    config = _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[name for name in wanted if name != EXPERTS],
        target_parameters=stacks if EXPERTS in wanted else None,
        exclude_modules=stacks if packed else None,
    )
    inject(model, config)
    return config


def inject(model: nn.Module, config: Any) -> None:
    """Put the adapter that peft's `config` describes into `model`, untrained."""
    peft = _peft()
    if adapted(model):
        raise ValueError(
            "the model has an adapter already; merge_adapter(model) makes it part of the weights"
        )
    config._register_custom_module({QuantizedLinear: importlib.import_module("peft.tuners.lora").Linear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # packed ones, registered above
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


def adapted(model: nn.Module) -> bool:
    """Whether `model` has an adapter."""
    return any("lora_" in name for name, _ in model.named_parameters())


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under the names peft's files have."""
    if not adapted(model):
        raise ValueError("the model has no adapter; add_lora(model) puts one on")
    own = _peft().get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    return {PREFIX + name: tensor.detach() for name, tensor in own.items()}


def save_adapter(model: nn.Module, config: Any, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` alone, adapter_config.json and adapter_model.safetensors, into the new or
    empty `folder`, whole or not at all. config: what `add_lora` returned. `load_adapter` reads it, and
    `peft.PeftModel.from_pretrained(model, folder)`."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    with new_folder(folder) as target:
        save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        (target / CONFIG_FILE).write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Any:
    """Put the adapter at `path` on `model`: a folder that `save_adapter` or peft wrote, or the checkpoint of
    a run that trained one. Returns peft's config.

    Raises CheckpointError where nothing is found there or it does not fit the model (every key that is
    missing, unexpected or of another shape).
    """
    place = Path(path)
    if place.is_file():
        settings, tensors = _of_checkpoint(place)
        config = add_lora(model, settings)
    else:
        if not (place / CONFIG_FILE).is_file() or not (place / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{place} holds no adapter: {CONFIG_FILE} and {WEIGHTS_FILE} expected")
        try:
            config = _peft().LoraConfig.from_pretrained(str(place))
            tensors = load_file(place / WEIGHTS_FILE)
        except (SafetensorError, ValueError, TypeError) as error:
            raise CheckpointError(f"{place} cannot be read as an adapter: {error}") from error
        inject(model, config)
    expected = {name: t.shape for name, t in adapter_tensors(model).items()}
    check_shapes(expected, {n: t.shape for n, t in tensors.items()}, str(place), type(model).__name__)
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    _peft().set_peft_model_state_dict(model, plain, adapter_name=NAME)
    return config


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Make the adapter part of the weights, in place; the model is then as it was before `add_lora`, with
    other values. Raises ValueError for packed weights, into which nothing can be merged."""
    layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    wrapped = [(name, m) for name, m in model.named_modules() if isinstance(m, layer)]
    if not wrapped:
        raise ValueError("the model has no adapter to merge")
    for name, module in wrapped:
        if isinstance(module.get_base_layer(), QuantizedLinear):
            raise ValueError(f"{name} has packed weights, which an adapter cannot be merged into")
    for _, module in wrapped:
        module.merge(safe_merge=True)
    inside: tuple[str, ...] = ()
    for name, module in wrapped:  # outer ones first; of nested ones these have the innermost as their base
        if not name.startswith(inside):
            model.set_submodule(name, module.get_base_layer())
            inside = (*inside, f"{name}.")
    for parameter in model.parameters():
        parameter.requires_grad = True


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What of the backbone can be adapted, by its last name."""
    for name, module in model.named_modules():
        if hasattr(model, "backbone") and not name.startswith("backbone."):
            continue
        if type(module) is nn.Linear or isinstance(module, QuantizedLinear):
            yield name.rpartition(".")[2], module
        elif isinstance(module, Experts):
            yield EXPERTS, module


def _of_checkpoint(file: Path) -> tuple[LoraSettings, dict[str, Tensor]]:
    """What a run that trained an adapter kept."""
    data = read_torch_file(file)
    lora = data.get("hyper_parameters", {}).get("lora") if isinstance(data, Mapping) else None
    if not isinstance(lora, Mapping):
        raise CheckpointError(f"{file} is no checkpoint of a run that trained an adapter")
    targets = lora["targets"]
    settings = LoraSettings(**{**lora, "targets": None if targets is None else tuple(targets)})
    prefix, ending = "model.", f".{NAME}"
    tensors = {
        PREFIX + name.removeprefix(prefix).replace(f"{ending}.", ".").removesuffix(ending): tensor
        for name, tensor in data["state_dict"].items()
    }
    return settings, tensors


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            "adapters need peft, which is not installed; install it with: pip install 'ssm-modal[adapters]'"
        ) from error

"""Models back from folders (the package's own, transformers', state-spaces') and from training runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ssm_modal.backbone import BackboneBase
from ssm_modal.checkpoints.family import Family, Fields, Part
from ssm_modal.checkpoints.fit import check_shapes
from ssm_modal.checkpoints.formats import family_of_document
from ssm_modal.checkpoints.locate import locate
from ssm_modal.checkpoints.room import DTYPES, check_device, check_room, stored_dtype
from ssm_modal.checkpoints.weights import TensorWeights, Weights, open_weights, read_torch_file
from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.layers.quantized import (
    QUANTISATIONS,
    Quantisation,
    packed_bytes,
    quantizable,
    replace_by_packed,
)
from ssm_modal.layers.wide import WideParameters
from ssm_modal.models.base import CONFIG_FILE, FORMAT, FORMAT_VERSION, Model, ModelConfig

PREFIX = "model."  # what a training run's keys begin with
_BACKBONE = "backbone."


@overload
def load_pretrained(
    path: str | os.PathLike[str],
    part: None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantisation | None = None,
) -> Model: ...
@overload
def load_pretrained(
    path: str | os.PathLike[str],
    part: Literal["backbone"],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantisation | None = None,
) -> BackboneBase: ...
def load_pretrained(
    path: str | os.PathLike[str],
    part: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantisation | None = None,
) -> Model | BackboneBase:
    """The model (in eval mode) that was saved, published or trained at `path`, with its weights.

    Weights go from the mapped file to the device a tensor at a time: the peak is the model itself on the
    device, and at most one file of it beside that in the host's memory.

    Args:
        path: a folder written by `save_pretrained`; a folder of transformers with a model of type mamba,
            falcon_mamba or jamba (config.json, one file or shards of safetensors); a folder of state-spaces'
            Mamba (config.json with ssm_cfg, pytorch_model.bin); the id of a Hugging Face repository with one
            of these; the folder of a training run (its best checkpoint, else its last); a .ckpt of one.
        part: None for the whole model, "backbone" for its backbone alone.
        device: where the weights go; None for the CPU.
        dtype: torch.float32, bfloat16, float16 or float64, which the weights are cast to. None keeps what
            was saved; of a published model, the one its config.json names, else that of its embedding.
            `A_log`, `D`, `dt_bias` and routers stay fp32.
        quantize: "int8" or "int4" packs the weights of the backbone's linear layers and experts by
            bitsandbytes, tensor by tensor: the peak on the device is the packed model and one tensor.
            Embedding, head and what makes dt, B and C stay in `dtype`. None: no.

    Raises:
        CheckpointError: nothing found there; a file missing, cut short or of an unknown format or
            architecture; weights that do not fit the architecture (every missing, unexpected and mis-shaped
            one is listed); too little memory on the device, with what would fit. Nothing is loaded then.
        ValueError: an unknown `part` or `quantize`, a device that is not there, or a dtype that it cannot
            compute in or that cannot be quantised (float64).
        ImportError: `quantize` without bitsandbytes.
    """
    if part not in (None, "backbone"):
        raise ValueError(f"load_pretrained: part is {part!r}, expected None or 'backbone'")
    if quantize not in (None, *QUANTISATIONS):
        raise ValueError(
            f"load_pretrained: quantize is {quantize!r}, expected None, "
            f"{' or '.join(map(repr, QUANTISATIONS))}"
        )
    if quantize is not None and dtype == torch.float64:
        raise ValueError("load_pretrained: dtype is torch.float64, which cannot be quantised")
    place = torch.device(device) if device is not None else torch.device("cpu")
    check_device(place, dtype)
    found = locate(path)
    source = _of_run(found) if found.is_file() else _of_folder(found)
    try:
        # On meta nothing is allocated, and the caller's random numbers are left as they are.
        with torch.device("meta"):
            model: Model | BackboneBase
            model = source.config.build() if part is None else source.config.backbone_config.build()
    except ConfigError as error:
        raise CheckpointError(f"{found}: the config is not one of this version's: {error}") from error
    fill(model, source, str(found), place, dtype, quantize)
    return model.eval()


@dataclass(frozen=True)
class Source:
    """A checkpoint: its model's config and its weights; for a published `family` also where each goes (the
    package's own files have a model's own names) and the dtype to cast to where the caller does not say."""

    config: ModelConfig
    weights: Weights
    family: Family | None = None
    parts: tuple[Part, ...] = ()
    dtype: torch.dtype | None = None


def fill(
    model: Model | BackboneBase,
    source: Source,
    where: str,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: Quantisation | None = None,
) -> None:
    """Give the parameters and buffers of `model`, on meta, their values; `load_pretrained` without a place.

    where: what errors call the source.
    """
    expected, weights = model.state_dict(), source.weights
    parts, ignored = _places(model, source)
    check_shapes(
        {key: expected[part.name][part.region].shape for key, part in parts.items()},
        {key: shape for key, shape in weights.shapes.items() if key not in ignored},
        where,
        type(model).__name__,
    )
    wide = _wide_names(model)
    dtypes = {p.name: _final_dtype(source, key, dtype, p.name in wide, where) for key, p in parts.items()}
    can_pack = {
        f"{name}.{own}": tuple(weight.shape)
        for name, module in quantizable(model)
        for own, weight in module.named_parameters(recurse=False)
        if own != "bias"
    }
    sizes = {
        kind: {name: packed_bytes(shape, kind) for name, shape in can_pack.items()} for kind in QUANTISATIONS
    }
    check_room(expected, dtypes, wide, device, where, sizes, quantize)
    packed = {} if quantize is None else replace_by_packed(model, quantize, dtypes, device)
    tensors: dict[str, Tensor] = {}
    head = None
    for key, tensor in weights.tensors():
        part = parts.get(key)
        if part is not None and part.name in packed:
            packed[part.name].put(tensor, part.region)
        elif part is not None:
            if part.name not in tensors:
                tensors[part.name] = torch.empty(
                    expected[part.name].shape, dtype=dtypes[part.name], device=device
                )
            tensors[part.name][part.region].copy_(tensor)
        elif source.family is not None and key == source.family.head:
            head = tensor
    if head is not None and not isinstance(model, BackboneBase):
        _check_tied(head, tensors["embedding.weight"], where)
    # Not strict: packed weights have their values; of the others check_shapes found every one.
    model.load_state_dict(tensors, strict=not packed, assign=True)


def _places(model: Model | BackboneBase, source: Source) -> tuple[dict[str, Part], set[str]]:
    """Where each key of the files goes in `model`, and the keys it rightly has no use for."""
    keys, family = source.weights.shapes.keys(), source.family
    prefix = _BACKBONE if isinstance(model, BackboneBase) else ""
    if family is None:
        parts = {prefix + name: Part(prefix + name, name) for name in model.state_dict()}
        return parts, {key for key in keys if not key.startswith(prefix)}
    known = {family.rename(key): key for key in keys}  # today's key to the file's
    every = {known.get(part.key, part.key): part for part in source.parts}
    parts = {
        key: Part(p.key, p.name.removeprefix(prefix), p.region)
        for key, p in every.items()
        if p.name.startswith(prefix)
    }
    ignored = every.keys() - parts.keys()
    if getattr(source.config, "tie_embeddings", False):
        ignored = ignored | {family.head}
    return parts, ignored


def _check_tied(head: Tensor, embedding: Tensor, where: str) -> None:
    if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding.cpu()):
        raise CheckpointError(
            f"{where} says that the head is tied to the embedding, but holds a head of other values; "
            "tie_word_embeddings (of state-spaces: tie_embeddings) in its config.json must then be false"
        )


def _wide_names(model: Model | BackboneBase) -> set[str]:
    """The names of the parameters that stay fp32 in a half-precision model."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, WideParameters)
        for name in module.wide_parameters
    }


def _final_dtype(source: Source, key: str, dtype: torch.dtype | None, wide: bool, where: str) -> torch.dtype:
    """The dtype that the model will have the tensor `key` of the files in."""
    stored = source.weights.dtypes[key]
    if stored in DTYPES:
        return stored_dtype(dtype or source.dtype or stored, wide)
    if source.family is not None:
        raise CheckpointError(
            f"{where}: {key} has dtype {stored}, expected one of {', '.join(map(str, DTYPES))}"
        )
    return stored


# ---------------------------------------------------------------- what a checkpoint holds


def read_document(folder: Path) -> dict[str, Any]:
    """The content of the config.json in `folder`; raises CheckpointError where there is none to read."""
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, expected a mapping")
    return document


def _of_folder(folder: Path) -> Source:
    document, path = read_document(folder), folder / CONFIG_FILE
    if document.get("format") == FORMAT:
        config = _own_config(document, path)
        return Source(config, open_weights(folder))
    family = family_of_document(document, str(path))
    try:
        config = family.read(Fields(document, str(path)))
    except ConfigError as error:
        raise CheckpointError(f"{path} describes no model that can be: {error}") from error
    weights = open_weights(folder)
    parts = tuple(family.parts(config, weights.shapes.keys()))
    return Source(config, weights, family, parts, _published_dtype(document, weights, parts))


def _own_config(document: Mapping[str, Any], path: Path) -> ModelConfig:
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {document.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "it was written by another version of the package"
        )
    if not isinstance(document.get("config"), dict):
        raise CheckpointError(f"{path} has no model config under the key 'config'")
    return _plain_config(document["config"], path)


def _plain_config(plain: Mapping[str, Any], where: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(plain)
    except ConfigError as error:
        raise CheckpointError(f"{where}: the config is not one of this version's: {error}") from error


def _published_dtype(
    document: Mapping[str, Any], weights: Weights, parts: tuple[Part, ...]
) -> torch.dtype | None:
    """One dtype for all weights: the one config.json names, else the embedding's."""
    named = document.get("dtype", document.get("torch_dtype"))
    dtype = getattr(torch, str(named).removeprefix("torch."), None) if named is not None else None
    if dtype in DTYPES:
        return dtype
    return next((weights.dtypes.get(p.key) for p in parts if p.name == "embedding.weight"), None)


def _of_run(path: Path) -> Source:
    """A training run's checkpoint; runs no code from the file."""
    data = read_torch_file(path)
    hyper = data.get("hyper_parameters") if isinstance(data, dict) else None
    if not isinstance(hyper, Mapping) or not isinstance(data.get("state_dict"), Mapping):
        raise CheckpointError(
            f"{path} is no checkpoint of a training run: no state_dict or no hyper_parameters in it"
        )
    if "lora" in hyper:
        raise CheckpointError(
            f"{path} holds an adapter alone; load the model that it is for, {hyper.get('model')!r}, and then "
            "ssm_modal.checkpoints.adapters.load_adapter(model, path) (--adapter on the command line)"
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
            tensors[name.removeprefix(PREFIX)] = value
    return Source(_plain_config(plain, path), TensorWeights(tensors))

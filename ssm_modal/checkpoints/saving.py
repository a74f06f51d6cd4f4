"""Models into folders that others read: transformers and state-spaces' mamba_ssm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_modal.checkpoints.companions import (
    GENERATION_FILE,
    TOKEN_IDS,
    companions,
    for_transformers,
    token_ids,
)
from ssm_modal.checkpoints.family import Family, Part
from ssm_modal.checkpoints.formats import STATE_SPACES, family_of_config
from ssm_modal.checkpoints.loading import read_document
from ssm_modal.checkpoints.locate import locate
from ssm_modal.checkpoints.weights import INDEX, TORCH_FILE
from ssm_modal.io.atomic import new_folder
from ssm_modal.models import CausalLM, Model
from ssm_modal.models.base import CONFIG_FILE, FORMAT, WEIGHTS_FILE, check_dense

Format = Literal["ssm_modal", "transformers", "state_spaces"]
FORMATS: tuple[Format, ...] = ("ssm_modal", "transformers", "state_spaces")
SHARD_BYTES = 5_000_000_000  # as transformers cuts


def save_pretrained(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    format: Format = "ssm_modal",
    source: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` into the new or empty `folder`, in the format that its reader expects.

    Args:
        format: "ssm_modal" for `load_pretrained` (as `model.save_pretrained`); "transformers" for
            `AutoModelForCausalLM.from_pretrained`, as model type mamba, falcon_mamba or jamba; "state_spaces"
            for mamba_ssm's `MambaLMHeadModel.from_pretrained`.
        source: where the model came from, as `load_pretrained` takes it: its tokenizer, chat template,
            generation defaults and special token ids go into the new folder. None writes none.
        shard_bytes: bytes of a file at most, but for a larger tensor; "transformers" alone is cut. Beside the
            model the host holds one shard.

    The folder appears whole or not at all. Padding rows of the vocabulary become ids of their own in
    transformers, which has no word for them; `residual_in_fp32` is written but for Jamba, whose stream
    transformers keeps in the weights' dtype.

    Raises:
        ConfigError: the architecture has no words in that format; says all that stands in the way.
        CheckpointError: `source` holds nothing, or a tokenizer that transformers has no form of.
        FileExistsError: `folder` is a file or holds something. ValueError: unknown `format`, `shard_bytes`; a
            model with quantised weights.
    """
    if format not in FORMATS:
        raise ValueError(f"save_pretrained: format is {format!r}, expected one of {', '.join(FORMATS)}")
    if shard_bytes < 1:
        raise ValueError(f"save_pretrained: shard_bytes is {shard_bytes}, expected 1 or more")
    check_dense(model)
    files, document = _beside(source)
    if format == FORMAT:
        with new_folder(folder) as target:
            model.save_pretrained(target)
            _write_all(target, files)
        return
    if not isinstance(model, CausalLM):
        raise TypeError(
            f"save_pretrained: model is a {type(model).__name__}, expected a CausalLM for format {format!r}"
        )
    if format == "state_spaces":
        config = STATE_SPACES.write(model.config)
        with new_folder(folder) as target:
            _write_json(target / CONFIG_FILE, config)
            torch.save(_all_tensors(model), target / TORCH_FILE)
            _write_all(target, for_transformers(files))
        return
    family = family_of_config(model.config)
    ids = token_ids(files, document)
    files = for_transformers(files)
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        **family.write(model.config),
        **ids,
    }
    with new_folder(folder) as target:
        _write_json(target / CONFIG_FILE, config)
        _write_shards(target, model, family, shard_bytes)
        _write_all(target, files)


def _beside(source: str | os.PathLike[str] | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files beside the weights at `source` and its config.json; empty where there is none."""
    if source is None:
        return {}, {}
    found = locate(source)
    if found.is_dir():
        files, document = companions(found), read_document(found)
        ids = {name: document[name] for name in TOKEN_IDS if document.get(name) is not None}
        if (
            ids and GENERATION_FILE not in files
        ):  # where the ids outlive a config.json that has no words for them
            files[GENERATION_FILE] = (json.dumps(ids, indent=2) + "\n").encode()
        return files, document
    # A training run keeps its tokenizer in its folder, beside the one of the checkpoints.
    places = [p for p in (found.parent, found.parent.parent) if companions(p)]
    return (companions(places[0]) if places else {}), {}


def _pieces(model: CausalLM, parts: list[Part]) -> Iterator[tuple[str, Tensor]]:
    state = model.state_dict()
    for part in parts:
        yield part.key, state[part.name][part.region]


def _all_tensors(model: CausalLM) -> dict[str, Tensor]:
    """state-spaces' own: the head is in the file, tied or not."""
    tensors = {
        key: tensor.detach().to("cpu", copy=True)
        for key, tensor in _pieces(model, STATE_SPACES.parts(model.config, ()))
    }
    embedding = tensors["backbone.embedding.weight"]
    return {**tensors, STATE_SPACES.head: tensors.get(STATE_SPACES.head, embedding)}


def _write_shards(target: Path, model: CausalLM, family: Family, shard_bytes: int) -> None:
    """Safetensors of at most `shard_bytes` and, where there are several, their index; one on the host at a
    time."""
    pieces = list(_pieces(model, family.parts(model.config, ())))
    shards: list[list[tuple[str, Tensor]]] = [[]]
    room = shard_bytes
    for key, tensor in pieces:
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((key, tensor))
        room -= size
    if len(shards) == 1:
        _save(shards[0], target / WEIGHTS_FILE)
        return
    stem, suffix = WEIGHTS_FILE.split(".")
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}"
        _save(shard, target / name)
        where |= {key: name for key, _ in shard}
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in pieces)
    _write_json(target / f"{WEIGHTS_FILE}{INDEX}", {"metadata": {"total_size": total}, "weight_map": where})


def _save(pieces: list[tuple[str, Tensor]], file: Path) -> None:
    # Copies: parts of one tensor may not share memory in a file.
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in pieces}
    save_file(tensors, file, metadata={"format": "pt"})


def _write_all(target: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (target / name).write_bytes(content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

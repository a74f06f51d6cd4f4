"""The files weights are kept in, read a tensor at a time: safetensors or torch's, one file or shards.

Nothing is unpickled but what `torch.load(weights_only=True)` allows, and safetensors holds no code at all.
Files are mapped, not read whole.
"""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssm_modal.errors import CheckpointError
from ssm_modal.models.base import WEIGHTS_FILE

TORCH_FILE = "pytorch_model.bin"
INDEX = ".index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights(ABC):
    """The tensors of a checkpoint. `shapes`, `dtypes`: each by its key, known without reading a tensor."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every key and its tensor on the CPU, file by file; a tensor may lie in the mapped file."""


class TensorWeights(Weights):
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {key: tuple(t.shape) for key, t in tensors.items()}
        self.dtypes = {key: t.dtype for key, t in tensors.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()


class SafetensorsFiles(Weights):
    """The tensors of safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 (no mapping)
                        _only_once(key, shapes, file)
                        about = opened.get_slice(key)
                        shapes[key] = tuple(about.get_shape())
                        dtypes[key] = _dtype(about.get_dtype(), key, file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file} cannot be read; it may be cut short or no safetensors file: {error}"
                ) from error
        self.shapes, self.dtypes = shapes, dtypes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    yield key, opened.get_tensor(key)


class TorchFiles(Weights):
    """The tensors of files that torch.save wrote: a mapping of names to tensors in each."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in files:
            for key, tensor in self._read(file).items():
                _only_once(key, shapes, file)
                shapes[key], dtypes[key] = tuple(tensor.shape), tensor.dtype
        self.shapes, self.dtypes = shapes, dtypes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            yield from self._read(file).items()

    @staticmethod
    def _read(file: Path) -> dict[str, Tensor]:
        data = read_torch_file(file)
        if not isinstance(data, Mapping) or not all(isinstance(t, Tensor) for t in data.values()):
            raise CheckpointError(f"{file} holds a {type(data).__name__}, expected names with their tensors")
        return {str(key): tensor for key, tensor in data.items()}


def read_torch_file(file: Path) -> Any:
    """What torch.save wrote to `file`, its tensors mapped; runs no code from it."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} cannot be read; it may be cut short or no checkpoint: {error}"
        ) from error


def open_weights(folder: Path) -> Weights:
    """The weights in `folder`: model.safetensors or its shards, else pytorch_model.bin or its shards.

    Raises CheckpointError where there are none, a shard is missing (all that are get named) or a file is cut
    short.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsFiles([folder / WEIGHTS_FILE])
    if (folder / f"{WEIGHTS_FILE}{INDEX}").is_file():
        return SafetensorsFiles(_shards(folder / f"{WEIGHTS_FILE}{INDEX}"))
    if (folder / TORCH_FILE).is_file():
        return TorchFiles([folder / TORCH_FILE])
    if (folder / f"{TORCH_FILE}{INDEX}").is_file():
        return TorchFiles(_shards(folder / f"{TORCH_FILE}{INDEX}"))
    raise CheckpointError(f"{folder} holds no weights: {' or '.join(WEIGHTS_FILES)} expected")


WEIGHTS_FILES = (WEIGHTS_FILE, f"{WEIGHTS_FILE}{INDEX}", TORCH_FILE, f"{TORCH_FILE}{INDEX}")


def _shards(index: Path) -> list[Path]:
    """The files an index names, each once, in order."""
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(document["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from error
    # Plain names alone: an index must not point out of its folder.
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong or not names:
        raise CheckpointError(f"{index} names {wrong or 'no files'}, expected the names of files beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}"
        )
    return [index.parent / name for name in names]


def _dtype(name: str, key: str, file: Path) -> torch.dtype:
    if name not in _DTYPES:
        raise CheckpointError(f"{file}: {key} has dtype {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _only_once(key: str, seen: Mapping[str, Any], file: Path) -> None:
    if key in seen:
        raise CheckpointError(f"{file} holds {key}, which an earlier shard holds too")

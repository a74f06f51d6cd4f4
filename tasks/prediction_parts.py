"""What a prediction has found so far, a file a batch, so that a killed one goes on where it stopped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_modal.io.atomic import put_in_place, write_aside
from ssm_modal.io.text import expand_path

# Settings of a data module that change nothing in its batches.
_NO_MATTER = frozenset({"num_workers", "pin_memory", "prepare_data_per_node", "trainer"})


class PredictionParts:
    """The parts of one prediction in the hidden folder `<results>/.predictions-<key>/`.

    Parts of another key are of another model or other inputs: they are left alone until a prediction ends.
    """

    def __init__(self, results: Path, key: str) -> None:
        self.results = results
        self.folder = results / f".predictions-{key}"

    def done(self) -> frozenset[int]:
        """The batches whose part is there."""
        return frozenset(int(file.stem) for file in self.folder.glob("[0-9]*.pt"))

    def save(self, batch: int, found: Mapping[str, Tensor]) -> None:
        """Keep what batch number `batch` gave; the file is whole or not there."""
        target = self.folder / f"{batch}.pt"
        put_in_place(write_aside(target, lambda aside: torch.save(dict(found), aside)), target)

    def load(self, batch: int) -> dict[str, Tensor]:
        """What `save` was given."""
        found: dict[str, Tensor] = torch.load(self.folder / f"{batch}.pt", weights_only=True)
        return found

    def remove(self) -> None:
        """Remove these parts and those of other keys, which no prediction goes on from any more."""
        for folder in self.results.glob(".predictions-*"):
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def prediction_key(model: nn.Module, data: Any, settings: Sequence[Any]) -> str:
    """A key of (weights, the data module's settings, its files, `settings`): where any of them differs, so
    does the key.

    Files are told apart by name, size and time of change: those that `data.predicted_files()` names and those
    of `data.input_files()`, if it has that; where there is none, all at or below `data.path`.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, value in sorted(vars(data).items()):
        if not name.startswith("_") and name not in _NO_MATTER:
            digest.update(f"{name}={_plain(value)!r}\n".encode())
    for line in (*_files(data), *settings):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """`value` as something whose repr is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str, Path)) or is_dataclass(value):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    describe = getattr(value, "to_config", None)
    return describe() if callable(describe) else type(value).__qualname__


def _files(data: Any) -> list[str]:
    ask = getattr(data, "predicted_files", None)
    named = [Path(name) for name in ask()] if callable(ask) else []
    ask = getattr(data, "input_files", None)
    named += ask() if callable(ask) else []
    path = getattr(data, "path", None)
    if not any(file.is_file() for file in named) and isinstance(path, str):
        root = expand_path(path)
        named += sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    lines = []
    for file in named:
        about = file.stat() if file.is_file() else None
        lines.append(f"{file} {about.st_size} {about.st_mtime_ns}" if about is not None else str(file))
    return lines

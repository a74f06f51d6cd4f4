"""Where the weights are: a saved folder, a run's folder, a .ckpt file or a Hugging Face repository."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssm_modal.checkpoints.companions import COMPANIONS
from ssm_modal.checkpoints.weights import WEIGHTS_FILES
from ssm_modal.errors import CheckpointError
from ssm_modal.models.base import CONFIG_FILE

# What is fetched of a repository: the model and the files beside it; torch's own files only where there is no
# safetensors.
_HUB_FILES = [CONFIG_FILE, "model*.safetensors", "model.safetensors.index.json", *COMPANIONS]
_TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def locate(path: str | os.PathLike[str]) -> Path:
    """The folder with config.json and weights, or the .ckpt file, that `path` stands for.

    Weights are model.safetensors or pytorch_model.bin, or shards of either with their index.

    A run's folder stands for its best checkpoint, else its last: `checkpoints/best*.ckpt`, then `last*.ckpt`,
    then any .ckpt, the newest of several. A path that is not there and reads as `owner/name` is fetched from
    the Hugging Face Hub. Raises CheckpointError where nothing is found.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix == ".ckpt":
            return local
        if local.name in (CONFIG_FILE, *WEIGHTS_FILES):
            return locate(local.parent)
        raise CheckpointError(f"{local} is neither a folder nor a .ckpt file")
    if local.is_dir():
        missing = [] if (local / CONFIG_FILE).is_file() else [CONFIG_FILE]
        if not any((local / name).is_file() for name in WEIGHTS_FILES):
            missing.append(" or ".join(WEIGHTS_FILES))
        if not missing:
            return local
        found = _run_checkpoint(local)
        if found is not None:
            return found
        held = ", ".join(sorted(p.name for p in local.iterdir())[:10]) or "nothing"
        raise CheckpointError(
            f"{local} holds no checkpoint: {' and '.join(missing)} missing, and no .ckpt in it or in its "
            f"checkpoints folder; it holds {held}"
        )
    name = os.fspath(path)
    if _REPO_ID.fullmatch(name):
        return _fetch(name)
    raise CheckpointError(f"{name} does not exist")


def stored_data(place: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What the checkpoint at `place` (a .ckpt file or a run's folder) holds of its data module: classes, the
    sample rate, the tokenizer, how images are prepared. Empty for a saved model's folder."""
    file = locate(place)
    if not file.is_file():
        return {}
    data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # Lightning keeps each data module's state under its class name.
    found = [value for key, value in data.items() if key.endswith("DataModule") and isinstance(value, dict)]
    return found[0] if found else {}


def _run_checkpoint(folder: Path) -> Path | None:
    places = [p for p in (folder / "checkpoints", folder) if p.is_dir()]
    for pattern in ("best*.ckpt", "last*.ckpt", "*.ckpt"):
        for place in places:
            found = sorted(place.glob(pattern), key=lambda p: (p.stat().st_mtime_ns, p.name))
            if found:
                return found[-1]
    return None


def _fetch(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES))
        if any((folder / name).is_file() for name in WEIGHTS_FILES):
            return folder
        return Path(snapshot_download(repo, allow_patterns=[*_HUB_FILES, *_TORCH_FILES]))
    except Exception as error:  # the hub's errors have no common base: offline, no such repository, no access
        raise CheckpointError(
            f"{repo} is no local path, and fetching it from the Hugging Face Hub failed: {error}"
        ) from error

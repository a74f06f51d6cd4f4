"""Checkpoints that appear whole or not at all, and are read without unpickling code."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ssm_modal.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file beside the target, flushes it to the disk, then renames.

    A process killed while saving, or a full disk, leaves what stood at the target before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`. Raises CheckpointError where that fails; `path` is then untouched."""
        if storage_options is not None:
            raise TypeError(f"storage_options is {storage_options!r}, expected None")
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            # torch.save reports a failed write of its zip writer as RuntimeError.
            if isinstance(error, (OSError, RuntimeError)):
                cause = error.__context__ if isinstance(error.__context__, OSError) else error
                before = f"; the checkpoint that stood there is whole: {target}" if target.exists() else ""
                raise CheckpointError(f"could not write the checkpoint {target}: {cause}{before}") from error
            raise

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, plain data and tensors only.

        Raises CheckpointError for a file that is not there or is no checkpoint.
        """
        source = Path(path)
        if not source.is_file():
            raise CheckpointError(f"no checkpoint at {source}")
        if not zipfile.is_zipfile(source):
            raise CheckpointError(
                f"{source} is no checkpoint (not a zip archive of torch.save, or cut short)"
            )
        try:
            return torch.load(source, map_location=map_location, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"could not read the checkpoint {source}: {error}") from error


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, so that a rename outlives a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Checkpoints that appear whole or not at all, and are read without unpickling code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ssm_modal.errors import CheckpointError
from ssm_modal.io.atomic import put_in_place, sync_folder, write_aside


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

        def write(aside: Path) -> None:
            with open(aside, "wb") as file:
                torch.save(checkpoint, file)

        try:
            put_in_place(write_aside(target, write), target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch.save reports a failed write of its zip writer as RuntimeError.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            before = f"; the checkpoint that stood there is whole: {target}" if target.exists() else ""
            raise CheckpointError(f"could not write the checkpoint {target}: {cause}{before}") from error

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

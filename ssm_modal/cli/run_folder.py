"""The folder of a run: config.yaml, metrics.csv, tensorboard/, checkpoints/ and results/.

A run's folder is fixed by its config. Going on with a run keeps it; starting again moves the earlier one
aside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssm_modal.errors import CheckpointError


class RunFolder:
    """The files of one run under `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        return self.path / "results"

    def move_aside(self) -> Path | None:
        """Rename an earlier run that stands here to the first free `<path>.1`, `<path>.2`, ...

        Returns where it is now, None where there was none. Raises NotADirectoryError where `path` is a file.
        """
        if self.path.is_file():
            raise NotADirectoryError(
                f"run_dir is {str(self.path)!r}, which is a file, expected a folder or nothing"
            )
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        n = 1
        while (aside := self.path.with_name(f"{self.path.name}.{n}")).exists():
            n += 1
        self.path.rename(aside)
        return aside

    def checkpoint(self, which: str) -> Path:
        """The checkpoint called "last" or "best", or at the path `which`.

        Raises CheckpointError where there is none.
        """
        if which in ("last", "best"):
            path = self.checkpoints / f"{which}.ckpt"
            if path.is_file():
                return path
            others = sorted(p.name for p in self.checkpoints.glob("*.ckpt") if not p.name.startswith("."))
            have = f"there are {', '.join(others)}" if others else "there is no checkpoint at all"
            raise CheckpointError(
                f"--ckpt_path {which}: no {path} ({have}); start the run without --ckpt_path, or check "
                "run_dir"
            )
        path = Path(which)
        if path.is_dir():
            return RunFolder(path).checkpoint_for_evaluation()
        if not path.is_file():
            raise CheckpointError(
                f"--ckpt_path is {which!r}, expected 'last', 'best' or the path of a checkpoint"
            )
        return path

    def checkpoint_for_evaluation(self) -> Path:
        """The best checkpoint, or the last where no best was kept; raises CheckpointError without either."""
        for name in ("best", "last"):
            path = self.checkpoints / f"{name}.ckpt"
            if path.is_file():
                return path
        raise CheckpointError(
            f"there is no checkpoint in {self.checkpoints}: train first (ssm-modal fit), or name one by "
            "--ckpt_path"
        )


def given_option(args: Sequence[str], name: str) -> str | None:
    """The value of the last `--name value` or `--name=value` in `args`, None where there is none."""
    value = None
    for i, arg in enumerate(args):
        if arg == f"--{name}" and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"--{name}="):
            value = arg.split("=", 1)[1]
    return value


def seeded_run_dir(run_dir: str, seed: Any, config_seed: Any) -> str:
    """`run_dir` for a run whose seed was given on the command line: `-seedN` where it is not the config's.

    So runs with different seeds do not share a folder, and each can be gone on with.
    """
    if seed == config_seed or re.search(rf"-seed{seed}$", run_dir):
        return run_dir
    return f"{run_dir}-seed{seed}"

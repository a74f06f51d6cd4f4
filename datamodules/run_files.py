"""What a data module writes into the run's folder: the tokenizer, and the list of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from ssm_modal.io.left_out import write_left_out
from ssm_modal.io.recordings import LeftOut
from ssm_modal.tokenizers import MuLawTokenizer, TextTokenizer, load_tokenizer


def save_run_tokenizer(tokenizer: TextTokenizer | MuLawTokenizer, folder: Path) -> None:
    """Write `tokenizer` to `tokenizer.json` in `folder`; ValueError where that file holds another one."""
    file = folder / "tokenizer.json"
    if file.exists():
        # A file of another tokenizer belongs to other checkpoints in this folder, or to somebody else.
        if load_tokenizer(file).to_config() == tokenizer.to_config():
            return
        raise ValueError(
            f"{file} holds another tokenizer than this run's; train into another folder "
            "(trainer.default_root_dir), or remove that file"
        )
    tokenizer.save(file)


def write_run_files(
    trainer: Trainer,
    *,
    tokenizer: TextTokenizer | MuLawTokenizer | None = None,
    left_out: Sequence[LeftOut] | None = None,
) -> bool:
    """Write the tokenizer and `left_out.csv`, those that are given, into the run's folder as `fit` begins.

    Only the first process writes, and none in a fast_dev_run; returns whether this one did. Raises ValueError
    as `save_run_tokenizer`.
    """
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return False
    folder = Path(trainer.default_root_dir)
    if tokenizer is not None:
        save_run_tokenizer(tokenizer, folder)
    if left_out is not None:
        write_left_out(folder / "left_out.csv", left_out)
    return True

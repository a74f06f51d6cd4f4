"""The tokenizer of a run, beside its checkpoints."""

from __future__ import annotations

from pathlib import Path

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

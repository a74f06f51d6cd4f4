"""The files beside a model's weights that say how to use it: tokenizer, special tokens, defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_modal.errors import CheckpointError
from ssm_modal.tokenizers.base import KIND

TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"
COMPANIONS = [
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
]
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companions(folder: Path) -> dict[str, bytes]:
    """The content of every such file in `folder`, by its name."""
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}


def for_transformers(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`files` as transformers reads them: of this package's tokenizer file, the Hugging Face one in it.

    Raises CheckpointError for a tokenizer (bytes, characters, DNA) that has no form there.
    """
    if TOKENIZER_FILE not in files:
        return dict(files)
    try:
        tokenizer = json.loads(files[TOKENIZER_FILE])
    except ValueError as error:
        raise CheckpointError(f"{TOKENIZER_FILE} is no tokenizer: {error}") from error
    kind = tokenizer.get(KIND) if isinstance(tokenizer, dict) else None
    if kind is None:
        return dict(files)
    if kind != "huggingface":
        raise CheckpointError(f"a tokenizer of kind {kind!r} has no form that transformers reads")
    out = {**files, TOKENIZER_FILE: json.dumps(tokenizer["tokenizer"], ensure_ascii=False).encode()}
    # Without this file transformers does not know which class reads tokenizer.json.
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.get("eos_token")}
    out.setdefault("tokenizer_config.json", (json.dumps(described, indent=2) + "\n").encode())
    return out


def token_ids(files: Mapping[str, bytes], document: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens that a config.json names, else a generation_config.json; None for none."""
    generation = json.loads(files[GENERATION_FILE]) if GENERATION_FILE in files else {}
    return {name: document.get(name, generation.get(name)) for name in TOKEN_IDS}

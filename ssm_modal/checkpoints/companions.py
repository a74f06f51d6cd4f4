"""The files beside a model's weights that say how to use it: tokenizer, special tokens, defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    """`files` as transformers reads them: of this package's tokenizer file, the Hugging Face one in it, or
    the one that makes the same ids of bytes.

    Raises CheckpointError for a tokenizer (characters, DNA) that has no form there.
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
    described = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if kind == "huggingface":
        inner, described["eos_token"] = tokenizer["tokenizer"], tokenizer.get("eos_token")
    elif kind == "byte":
        inner = _byte_level(tokenizer["specials"])
        described |= {f"{name}_token": f"<{name}>" for name in tokenizer["specials"]}
    else:
        raise CheckpointError(f"a tokenizer of kind {kind!r} has no form that transformers reads")
    out = {**files, TOKENIZER_FILE: json.dumps(inner, ensure_ascii=False).encode()}
    # Without this file transformers does not know which class reads tokenizer.json.
    out.setdefault("tokenizer_config.json", (json.dumps(described, indent=2) + "\n").encode())
    return out


def _byte_level(specials: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json of bytes as ids 0 to 255 and `specials` from 256 on: byte-level BPE without a merge.

    Its tokens are the characters that GPT-2 writes bytes as: printable ones of Latin-1 stand for themselves,
    the others, in order, are U+0100 and on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": f"<{name}>", **flags} for i, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }


def token_ids(files: Mapping[str, bytes], document: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens that a config.json names, else a generation_config.json; None for none."""
    generation = json.loads(files[GENERATION_FILE]) if GENERATION_FILE in files else {}
    return {name: document.get(name, generation.get(name)) for name in TOKEN_IDS}

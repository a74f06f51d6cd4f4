"""Readers and writers of files. Import what you need from its module; nothing here needs an extra."""

from __future__ import annotations

from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.ids import IdCorpus, IdSplit, id_dtype, load_ids, open_corpus, write_corpus
from ssm_modal.io.text import TextFileError, expand_path, iter_text, read_text, text_files

__all__ = [
    "IdCorpus",
    "IdSplit",
    "TextFileError",
    "atomic_write",
    "expand_path",
    "id_dtype",
    "iter_text",
    "load_ids",
    "open_corpus",
    "read_text",
    "text_files",
    "write_corpus",
]

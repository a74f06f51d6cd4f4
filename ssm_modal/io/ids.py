"""Token ids on the disk: written once as a stream, mapped into memory when read.

A corpus is a folder, named by a hash of the texts' content and of the tokenizer:

    meta.json              dtype, counts, format
    train.bin              ids, little-endian, the narrowest of uint8, uint16, int32 that holds the vocabulary
    train.borders.bin      int64, where each document begins, and the end: (documents + 1,)
    validation.bin, validation.borders.bin   the last part of each document

It is built beside its place and renamed, so a reader finds it whole or not at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ssm_modal.io.text import TextFileError, iter_text

FORMAT = 1
_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "int32": torch.int32, "int64": torch.int64}
_COPY_BYTES = 16 << 20


def id_dtype(vocab_size: int) -> torch.dtype:
    """The narrowest dtype that holds ids 0 ... vocab_size - 1: uint8, uint16 or int32."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 or more")
    if vocab_size <= 1 << 8:
        return torch.uint8
    if vocab_size <= 1 << 16:
        return torch.uint16
    if vocab_size <= 1 << 31:
        return torch.int32
    raise ValueError(f"vocab_size is {vocab_size}, expected at most 2^31")


def load_ids(path: str | os.PathLike[str], dtype: torch.dtype) -> Tensor:
    """The ids in the raw file `path` as a 1-D tensor of `dtype`, mapped: only what is read takes memory.

    Writing to the tensor never reaches the file. Raises FileNotFoundError, and ValueError for a file whose
    size is no multiple of the item size.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: there is no such file of ids")
    size, item = file.stat().st_size, dtype.itemsize
    if size % item:
        raise ValueError(f"{file} holds {size} bytes, expected a multiple of {item} ({dtype})")
    if size == 0:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(file), shared=False, size=size // item, dtype=dtype)


@dataclass(frozen=True, eq=False)
class IdSplit:
    """One split, mapped: ids (tokens,) of the corpus' dtype, borders (documents + 1,) int64."""

    ids: Tensor
    borders: Tensor


@dataclass(frozen=True)
class IdCorpus:
    """A corpus on the disk: its place and sizes, cheap to send to another process; `split` maps the ids."""

    folder: Path
    dtype_name: str
    vocab_size: int
    tokens: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype_name]

    def split(self, name: str) -> IdSplit:
        """The split `name`, "train" or "validation"."""
        if name not in self.tokens:
            raise ValueError(f"split is {name!r}, expected one of {sorted(self.tokens)}")
        return IdSplit(
            load_ids(self.folder / f"{name}.bin", self.dtype),
            load_ids(self.folder / f"{name}.borders.bin", torch.int64),
        )


def open_corpus(folder: str | os.PathLike[str]) -> IdCorpus:
    """The corpus written in `folder`; raises ValueError when its files do not fit its `meta.json`."""
    root = Path(folder)
    meta = json.loads((root / "meta.json").read_text(encoding="utf-8"))
    corpus = IdCorpus(
        root, str(meta["dtype"]), int(meta["vocab_size"]), {k: int(v) for k, v in meta["tokens"].items()}
    )
    for name, count in corpus.tokens.items():
        size = (root / f"{name}.bin").stat().st_size
        if size != count * corpus.dtype.itemsize:
            raise ValueError(
                f"{root / name}.bin holds {size} bytes, expected {count} ids; remove {root} and try again"
            )
    return corpus


def write_corpus(
    files: Sequence[Path],
    encode: Callable[[str], Tensor],
    *,
    vocab_size: int,
    fingerprint: str,
    cache_dir: str | os.PathLike[str],
    val_fraction: float = 0.0,
    eos_id: int | None = None,
) -> IdCorpus:
    """Encode `files`, one document each, into a corpus below `cache_dir`, or find it there.

    encode: text to ids (n,) of any integer dtype.
    vocab_size: ids are below it; it decides the dtype of the files.
    fingerprint: names the tokenizer, changes whenever `encode` does.
    val_fraction: the first `int(n * (1 - val_fraction))` ids of each document of n are the split "train", the
        rest "validation".
    eos_id: put at the end of each document; None puts nothing.

    Files are read in pieces; at most a few pieces are in memory at once. Raises TextFileError for an empty or
    binary file, ValueError for an id outside the vocabulary, OSError when the disk is full; in each case
    nothing is left behind.
    """
    if not files:
        raise ValueError("files is empty, expected at least one text file")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
    key = _corpus_key(files, fingerprint, val_fraction, eos_id)
    root = Path(cache_dir)
    target = root / key
    if (target / "meta.json").is_file():
        return open_corpus(target)
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".tmp", dir=root))
    try:
        _build(work, files, encode, vocab_size, val_fraction, eos_id)
        try:
            os.rename(work, target)
        except OSError:
            # Another process built the same corpus meanwhile; its content is the same.
            if not (target / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_corpus(target)


def _corpus_key(files: Sequence[Path], fingerprint: str, val_fraction: float, eos_id: int | None) -> str:
    whole = hashlib.sha256(json.dumps([FORMAT, fingerprint, val_fraction, eos_id, sys.byteorder]).encode())
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{str(file)!r}: there is no such file")
        with open(file, "rb") as source:
            whole.update(hashlib.file_digest(source, "sha256").digest())
    return whole.hexdigest()[:32]


def _build(
    work: Path,
    files: Iterable[Path],
    encode: Callable[[str], Tensor],
    vocab_size: int,
    val_fraction: float,
    eos_id: int | None,
) -> None:
    dtype = id_dtype(vocab_size)
    borders = {"train": array("q", [0]), "validation": array("q", [0])}
    with open(work / "train.bin", "w+b") as train, open(work / "validation.bin", "wb") as validation:
        for file in files:
            start = train.tell()
            for text in iter_text(file):
                _append(train, encode(text), dtype, vocab_size, file)
            if eos_id is not None:
                _append(train, torch.tensor([eos_id]), dtype, vocab_size, file)
            count = (train.tell() - start) // dtype.itemsize
            if count == 0:
                raise TextFileError(file, "the tokenizer makes no ids of it, expected some text")
            kept = int(count * (1.0 - val_fraction))
            _move_tail(train, start + kept * dtype.itemsize, validation)
            for name, out in (("train", train), ("validation", validation)):
                end = out.tell() // dtype.itemsize
                if end > borders[name][-1]:
                    borders[name].append(end)
        for out in (train, validation):
            out.flush()
            os.fsync(out.fileno())
    for name, values in borders.items():
        (work / f"{name}.borders.bin").write_bytes(values.tobytes())
    meta = {
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "tokens": {name: values[-1] for name, values in borders.items()},
        "documents": {name: len(values) - 1 for name, values in borders.items()},
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _append(out: BinaryIO, ids: Tensor, dtype: torch.dtype, vocab_size: int, file: Path) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{file}: the tokenizer gave id {low if low < 0 else high}, expected 0 to {vocab_size - 1}"
        )
    out.write(_raw(ids.to(dtype).contiguous()))


def _raw(ids: Tensor) -> bytes:
    # Straight from memory, because numpy is no core dependency; `ids` is contiguous and on the CPU.
    return ctypes.string_at(ids.data_ptr(), ids.numel() * ids.element_size())


def _move_tail(source: BinaryIO, start: int, target: BinaryIO) -> None:
    """Move the bytes of `source` from `start` to its end to the end of `target`."""
    source.flush()
    source.seek(start)
    while block := source.read(_COPY_BYTES):
        target.write(block)
    source.truncate(start)
    source.seek(start)

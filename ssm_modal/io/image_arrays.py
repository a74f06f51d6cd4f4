"""MNIST and CIFAR from their original files, in torchvision's folders; nothing is downloaded."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.images import ImageError
from ssm_modal.io.text import expand_path

_IDX_TYPES = {1: "labels", 3: "images"}  # by the number of axes
MNIST_FILES = {"train": "train", "test": "t10k"}
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Images of one size. images: (n, height, width) grey or (n, height, width, 3), uint8; labels: (n,)
    int64, numbers of `classes`; source: the file they stand in."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return self.images.shape[0]


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """An IDX file of bytes, gzipped where its name ends in .gz: labels (n,) or images (n, height, width),
    uint8. Raises FileNotFoundError, and ImageError for a file of another format or another size."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: there is no such file")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(file, f"cannot be unpacked ({error}); it may be cut short") from None
    axes = data[3] if len(data) >= 4 else 0
    if data[:3] != b"\0\0\x08" or axes not in _IDX_TYPES:
        raise ImageError(
            file, f"begins with {data[:4].hex(' ')}, expected 00 00 08 01 (labels) or 00 00 08 03 (images)"
        )
    head = 4 + 4 * axes
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, head, 4)]
    if len(data) != head + math.prod(shape):
        raise ImageError(
            file,
            f"holds {len(data)} bytes, expected {head + math.prod(shape)} for {_IDX_TYPES[axes]} {shape}",
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[head:].view(shape)


def read_mnist(path: str | os.PathLike[str], split: str) -> ImageArray:
    """MNIST, or a set in its format (Fashion-MNIST, KMNIST), from `path` or `path/raw` or `path/MNIST/raw`.

    split: "train" or "test". The files may be gzipped, and named with "-idx" or ".idx". Raises as `read_idx`,
    and ImageError where images and labels do not fit.
    """
    root = expand_path(path)
    begin = MNIST_FILES[split]
    images_file = _find(root, [f"{begin}-images-idx3-ubyte", f"{begin}-images.idx3-ubyte"])
    labels_file = _find(root, [f"{begin}-labels-idx1-ubyte", f"{begin}-labels.idx1-ubyte"])
    images, labels = read_idx(images_file), read_idx(labels_file).long()
    if images.ndim != 3:
        raise ImageError(images_file, f"holds labels {tuple(images.shape)}, expected images")
    if labels.ndim != 1 or len(labels) != len(images):
        raise ImageError(labels_file, f"holds {tuple(labels.shape)} labels, expected ({len(images)},)")
    _check_labels(labels_file, labels, 10)
    return ImageArray(images, labels, tuple(str(i) for i in range(10)), images_file.name)


def read_cifar(path: str | os.PathLike[str], name: str, split: str) -> ImageArray:
    """CIFAR-10 or CIFAR-100 (name "cifar10" or "cifar100", fine labels) in the Python format, from `path` or
    torchvision's folder below it. split: "train" or "test".

    The files are pickles; only arrays and plain values are read from them, anything else is an ImageError.
    """
    root = expand_path(path)
    folder = root / CIFAR_FOLDERS[name] if (root / CIFAR_FOLDERS[name]).is_dir() else root
    if name == "cifar10":
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        meta, key, names = "batches.meta", "labels", "label_names"
    else:
        files, meta, key, names = [split], "meta", "fine_labels", "fine_label_names"
    images, labels = [], []
    for file in files:
        content = _unpickle(folder / file)
        try:
            images.append(torch.from_numpy(content["data"]).view(-1, 3, 32, 32))
            labels.append(torch.tensor(content[key], dtype=torch.int64))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ImageError(
                folder / file, f"has no fitting 'data' and {key!r} ({error}), expected a file of {name}"
            ) from None
        if len(images[-1]) != len(labels[-1]):
            raise ImageError(
                folder / file,
                f"holds {len(images[-1])} images and {len(labels[-1])} labels, expected as many",
            )
    classes = tuple(_text(one) for one in _unpickle(folder / meta).get(names, ()))
    _check_labels(folder / files[0], torch.cat(labels), len(classes))
    return ImageArray(torch.cat(images).permute(0, 2, 3, 1), torch.cat(labels), classes, "+".join(files))


def _check_labels(file: Path, labels: Tensor, classes: int) -> None:
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        held = f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
        raise ImageError(file, f"holds labels {held}, expected 0 to {classes - 1}")


def _find(root: Path, names: list[str]) -> Path:
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        for name in names:
            for file in (folder / f"{name}.gz", folder / name):
                if file.is_file():
                    return file
    raise FileNotFoundError(
        f"path is {str(root)!r}: no {names[0]} or {names[0]}.gz in it, in raw or in MNIST/raw; put the "
        "original files there (nothing is downloaded)"
    )


class _Unpickler(pickle.Unpickler):
    """Arrays and plain values alone: a pickle may run anything it names."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR does")
        if name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        return super().find_class(module, name)


def _unpickle(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r}: there is no such file; put the original ones there (nothing is downloaded)"
        )
    try:
        with open(file, "rb") as source:
            content = _Unpickler(source, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError, IndexError) as error:
        raise ImageError(file, f"cannot be read as a file of CIFAR ({error})") from None
    if not isinstance(content, dict):
        raise ImageError(file, f"holds a {type(content).__name__}, expected a dict")
    return {_text(key): value for key, value in content.items()}


def _text(name: str | bytes) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else name

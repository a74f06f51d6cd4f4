"""Matrices on the disk that are filled piece by piece, then kept as safetensors or HDF5.

While a job runs, its matrices stand as fp32 in one file, whose size is known from the start: already a
safetensors file (8 bytes: size of the header; JSON; the numbers), so that finishing such a job is a rename.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssm_modal.io.atomic import put_in_place, write_aside

Dtype = Literal["float32", "float16"]
_NAMES = {"float32": ("F32", 4), "float16": ("F16", 2)}
_PIECE = 1 << 22  # numbers that are converted at once


def output_format(path: str | os.PathLike[str]) -> Literal["safetensors", "hdf5"]:
    """What `path` is to be, by its ending. Raises ValueError for another one, ImportError without h5py."""
    ending = Path(path).suffix.lower()
    if ending == ".safetensors":
        return "safetensors"
    if ending in (".h5", ".hdf5"):
        load_h5py()
        return "hdf5"
    raise ValueError(f"the output is {str(path)!r}, expected a name that ends in .safetensors, .h5 or .hdf5")


def load_h5py() -> Any:
    """The package h5py; raises ImportError naming the command that mends it where it is missing."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'ssm-modal[genomics]'") from error
    return h5py


class EmbeddingStore:
    """Matrices of fp32, each (rows, width), in the file `path`.

    path: made if it is not there, all zeros; what is there must be of the same matrices. rows: of each matrix
    by name. metadata: text by name, kept in the file's header.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rows: Mapping[str, int],
        width: int,
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self.width = Path(path), width
        self.rows, self.metadata = dict(rows), dict(metadata)
        header, self._begin, size = _header(self.rows, width, self.metadata, "float32")
        if not self.path.is_file() or self.path.stat().st_size != self._begin["\0"] + size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "wb") as file:
                file.write(header)
                file.truncate(len(header) + size)
        self._file = open(self.path, "r+b")  # noqa: SIM115

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of a matrix, fp32 (last - first, width)."""
        blob = bytearray((last - first) * self.width * 4)
        self._file.seek(self._place(name, first))
        self._file.readinto(blob)
        values = torch.frombuffer(blob, dtype=torch.float32) if blob else torch.empty(0)
        return values.view(last - first, self.width)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Put `values` (n, width) of any floating dtype, on the host, at row `first` of a matrix."""
        if not 0 <= first <= first + len(values) <= self.rows[name]:
            raise IndexError(f"rows {first} to {first + len(values)}, but {name!r} has {self.rows[name]}")
        self._file.seek(self._place(name, first))
        self._file.write(values.float().contiguous().numpy().tobytes())

    def flush(self) -> None:
        """Have everything on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and keep it, for a later start."""
        self._file.close()

    def finish(self, target: str | os.PathLike[str], dtype: Dtype) -> None:
        """Make the file `target` of it, whole or not at all, and remove what this one was."""
        self.flush()
        wanted = Path(target)
        if output_format(wanted) == "hdf5":
            put_in_place(write_aside(wanted, lambda aside: self._write_hdf5(aside, dtype)), wanted)
        elif dtype != "float32":
            put_in_place(write_aside(wanted, lambda aside: self._write_converted(aside, dtype)), wanted)
        else:
            self.close()
            os.replace(self.path, wanted)
            return
        self.close()
        self.path.unlink()

    def _place(self, name: str, row: int) -> int:
        return self._begin[name] + row * self.width * 4

    def _pieces(self, name: str, use: Callable[[int, Tensor], object]) -> None:
        step = max(1, _PIECE // max(1, self.width))
        for first in range(0, self.rows[name], step):
            use(first, self.read(name, first, min(first + step, self.rows[name])))

    def _write_converted(self, aside: Path, dtype: Dtype) -> None:
        header, _, _ = _header(self.rows, self.width, self.metadata, dtype)
        kind = getattr(torch, dtype)
        with open(aside, "wb") as out:
            out.write(header)
            for name in self.rows:
                self._pieces(name, lambda _, piece: out.write(piece.to(kind).numpy().tobytes()))

    def _write_hdf5(self, aside: Path, dtype: Dtype) -> None:
        h5py = load_h5py()
        with h5py.File(aside, "w") as out:
            for key, value in self.metadata.items():
                # A list of records may be longer than an attribute can be (64 KiB).
                if len(value) < 1 << 15:
                    out.attrs[key] = value
                else:
                    out.create_dataset(f"metadata/{key}", data=value)
            for name, rows in self.rows.items():
                # "/" would make groups.
                data = out.create_dataset(name.replace("/", "%2F"), (rows, self.width), dtype=dtype)

                def put(first: int, piece: Tensor, data: Any = data) -> None:
                    data[first : first + len(piece)] = piece.numpy()

                self._pieces(name, put)


def _header(
    rows: Mapping[str, int], width: int, metadata: Mapping[str, str], dtype: Dtype
) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, the first byte of each matrix (and under "\\0" of the first), and the
    bytes of all."""
    kind, size = _NAMES[dtype]
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    begins: dict[str, int] = {}
    for name, n in rows.items():
        end = at + n * width * size
        content[name] = {"dtype": kind, "shape": [n, width], "data_offsets": [at, end]}
        begins[name] = at
        at = end
    text = json.dumps(content, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {"\0": len(head), **{name: begin + len(head) for name, begin in begins.items()}}, at

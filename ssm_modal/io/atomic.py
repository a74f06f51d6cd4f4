"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path` so that a reader finds the old file or the whole new one.

    The data goes to a temporary file in the same folder, is flushed to the disk and then renamed. When
    anything fails (a full disk, say) the temporary file is removed, what stood at `path` stays, and the
    OSError is raised.
    """
    target = Path(path)
    blob = data.encode("utf-8") if isinstance(data, str) else data
    put_in_place(write_aside(target, lambda aside: aside.write_bytes(blob)), target)
    return target


def write_aside(target: Path, write: Callable[[Path], object]) -> Path:
    """Have `write` fill a new temporary file beside `target`, and flush it to the disk; returns its path.

    The folder is made where it is missing. Where anything fails the file is removed and the error raised.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files only their owner can read; give the rights an ordinary new file would have.
        aside.chmod(0o666 & ~_umask())
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    return aside


def put_in_place(aside: Path, target: Path) -> None:
    """Rename what `write_aside` wrote to `target`; removed where that fails."""
    try:
        os.replace(aside, target)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` when the block ends and is removed where it raises.

    `path` must be new or an empty folder, else FileExistsError. Every file is flushed to the disk first.
    """
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        what = "holds files" if target.is_dir() else "is a file"
        raise FileExistsError(f"{target} {what}, expected a new or an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield aside
        for file in (p for p in aside.rglob("*") if p.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        aside.chmod(0o777 & ~_umask())
        os.replace(aside, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, so that a rename outlives a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask

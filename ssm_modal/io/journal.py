"""What an unfinished job has done so far, kept beside its output, so that it goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Journal:
    """Lines of JSON in a file: first what the job is, then one pair [key, value] a finished part.

    done: what was finished before this start and since, by key. differs: where the file is of another job,
    the names of what is different; its content is then dropped. A last line that a kill cut short is dropped
    too.

    path: the file. job: plain data that two starts of the same job share, and no other job has: inputs,
    model, options.
    """

    def __init__(self, path: str | os.PathLike[str], job: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.done: dict[str, Any] = {}
        self.differs: tuple[str, ...] = ()
        wanted = json.loads(json.dumps(dict(job)))
        size = self._read(wanted) if self.path.is_file() else 0
        if not size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        else:
            os.truncate(self.path, size)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Keep finished parts; when this returns they are on the disk."""
        for key, value in entries:
            self._file.write(json.dumps([key, value]) + "\n")
            self.done[key] = value
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and keep it, for a later start."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file: the job's output is in its place."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, wanted: dict[str, Any]) -> int:
        """Fill `done`; returns the bytes that are whole lines of this job, 0 where it is another's."""
        blob = self.path.read_bytes()
        size = 0
        for number, line in enumerate(blob.splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
            except ValueError:
                break
            if number == 0:
                if not isinstance(content, dict) or content != wanted:
                    have = content if isinstance(content, dict) else {}
                    names = sorted({*have, *wanted})
                    self.differs = tuple(name for name in names if have.get(name) != wanted.get(name))
                    return 0
            else:
                key, value = content
                self.done[key] = value
            size += len(line)
        return size

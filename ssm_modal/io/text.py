"""Reading files and folders of UTF-8 text, in pieces, so that a file of many GB needs little memory."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

PIECE_BYTES = 4 << 20
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
# Between two lines of text: a newline with no other white space on either side. Tokenizers that split text in
# words before merging (GPT-2's and its kin) never join characters across this place.
_LINE_BORDER = re.compile(r"(?<=\S)\n(?=\S)")


class TextFileError(ValueError):
    """A text file that cannot be used: empty, binary, or not UTF-8.

    path: the file. offset: the first bad byte, counted from 0, or None where no one byte is to blame.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str, offset: int | None = None) -> None:
        self.path = Path(path)
        self.offset = offset
        super().__init__(f"{self.path}: {problem}")


def expand_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """`path` with `~` and environment variables (`$NAME`, `${NAME}`) filled in.

    Raises ValueError for an empty path and for a variable that is not set; `name` is what the error calls it.
    """
    raw = os.fspath(path)
    if not raw:
        raise ValueError(f"{name} is empty, expected the path of a file or folder")
    full = os.path.expanduser(os.path.expandvars(raw))
    left = _VARIABLE.search(full)
    if left:
        variable = left.group(1).strip("{}")
        if variable not in os.environ and variable in raw:
            raise ValueError(
                f"{name} is {raw!r}, but the environment variable {variable} is not set; set it first"
            )
    return Path(full)


def output_folder(path: str | os.PathLike[str], name: str = "--out") -> Path:
    """`expand_path` of a folder to be written to; NotADirectoryError where a file stands there."""
    folder = expand_path(path, name)
    if folder.is_file():
        raise NotADirectoryError(f"{name} is {str(folder)!r}, which is a file, expected a folder or nothing")
    return folder


def text_files(
    path: str | os.PathLike[str], suffixes: Sequence[str] = (".txt",), name: str = "path"
) -> list[Path]:
    """The text files at `path`: itself when it is a file, else those below it with one of `suffixes`.

    Folders are read recursively and in the order of their relative paths, so every machine finds the same
    order; names that begin with a dot are left out. Raises FileNotFoundError when nothing is there or no file
    fits.
    """
    if isinstance(suffixes, str):
        raise TypeError(f"suffixes is the string {suffixes!r}, expected a list of endings such as ['.txt']")
    for suffix in suffixes:
        if not suffix.startswith("."):
            raise ValueError(
                f"suffixes holds {suffix!r}, expected endings that begin with a dot, such as '.txt'"
            )
    root = expand_path(path, name)
    if root.is_file():
        return [root]
    if not root.exists():
        raise FileNotFoundError(f"{name} is {str(root)!r}: there is no such file or folder")
    if not root.is_dir():
        raise ValueError(f"{name} is {str(root)!r}, expected a file or a folder")
    wanted = tuple(s.lower() for s in suffixes)
    found: list[Path] = []
    others: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(wanted):
                found.append(Path(folder, file))
            else:
                others.add(Path(file).suffix or file)
    if not found:
        held = ", ".join(sorted(others)[:8]) if others else "no files"
        raise FileNotFoundError(
            f"{name} is {str(root)!r}: no file below it ends in {' or '.join(suffixes)} (it holds {held}); "
            "name other endings with suffixes"
        )
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def iter_text(path: str | os.PathLike[str], piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """The text of one UTF-8 file in pieces of about `piece_bytes`, which joined give the text unchanged.

    Newlines are kept as they are. Pieces end between two lines where there is such a place (see
    `_LINE_BORDER`), so that encoding them one by one gives the ids of the whole. A file of up to
    `piece_bytes` is one piece. Raises FileNotFoundError, and TextFileError for an empty file, a NUL byte or
    bytes that are not UTF-8.
    """
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes is {piece_bytes}, expected 1 or more")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: there is no such file")
    held = ""
    for text in _decoded(file, piece_bytes):
        held += text
        if len(held) <= piece_bytes:
            continue
        cut = _cut_at(held, patient=len(held) <= 8 * piece_bytes)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of one UTF-8 file; errors as `iter_text`."""
    return "".join(iter_text(path))


def _decoded(file: Path, size: int) -> Iterator[str]:
    """The file's text as it is read, not cut at lines; raises on the first bad byte, named by its offset."""
    with open(file, "rb") as source:
        rest, base, empty = b"", 0, True
        while True:
            block = source.read(size)
            nul = block.find(b"\0")
            if nul >= 0:
                at = base + len(rest) + nul
                raise TextFileError(
                    file, f"byte {at} is NUL, so this is a binary file; expected UTF-8 text", at
                )
            data = rest + block
            empty = empty and not data
            try:
                text, used = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as error:
                at = base + error.start
                byte = data[error.start]
                raise TextFileError(
                    file,
                    f"byte {at} (0x{byte:02x}) is not valid UTF-8 ({error.reason}); expected UTF-8 text",
                    at,
                ) from None
            if text:
                yield text
            rest, base = data[used:], base + used
            if not block:
                break
    if empty:
        raise TextFileError(file, "the file is empty, expected some text")


def _cut_at(text: str, patient: bool) -> int:
    """Where to cut: behind the last newline between two lines, else (not `patient`) wherever is least bad."""
    end = len(text)
    while (end := text.rfind("\n", 1, end)) > 0:
        if _LINE_BORDER.match(text, end):
            return end + 1
    if patient:
        return 0
    # One line longer than eight pieces: cut at a space, or in the last resort anywhere.
    space = text.rfind(" ", 1)
    return space if space > 0 else len(text)

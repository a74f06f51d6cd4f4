"""Reading text and writing ids: content kept, errors that name file and place, nothing half-written."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.ids import id_dtype, load_ids, open_corpus, write_corpus
from ssm_modal.io.text import TextFileError, expand_path, iter_text, output_folder, read_text, text_files
from ssm_modal.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer


def corpus_of(files: list[Path], tokenizer: TextTokenizer, cache: Path, **options: float):
    return write_corpus(
        files,
        tokenizer.encode_ids,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint(),
        cache_dir=cache,
        eos_id=tokenizer.eos_id,
        **options,
    )


def test_files_of_a_folder_are_sorted_and_filtered(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.TXT", "a.txt", "skip.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [str(f.relative_to(tmp_path)) for f in text_files(tmp_path)]
    assert names == ["a/b.TXT", "a/z.txt", "a.txt", "b.txt"]
    assert [f.name for f in text_files(tmp_path, (".md",))] == ["skip.md"]
    # A file given by name is read whatever its ending.
    assert text_files(tmp_path / "skip.md") == [tmp_path / "skip.md"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path is '.*nowhere': there is no such file or folder"):
        text_files(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no file below it ends in \.txt or \.md \(it holds \.csv\)"):
        text_files(tmp_path, (".txt", ".md"))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"begin with a dot"):
        text_files(tmp_path, ("txt",))
    with pytest.raises(TypeError, match=r"expected a list of endings"):
        text_files(tmp_path, ".txt")


def test_paths_fill_in_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOT_SET", raising=False)
    assert (
        expand_path("$SOME_DATA/x") == expand_path("${SOME_DATA}/x") == expand_path("~/x") == tmp_path / "x"
    )
    with pytest.raises(
        ValueError, match=r"path is '\$NOT_SET/x', but the environment variable NOT_SET is not set"
    ):
        expand_path("$NOT_SET/x")
    with pytest.raises(ValueError, match="path is empty"):
        expand_path("")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"--out is '.*file', which is a file, expected a folder"):
        output_folder("~/file")
    assert output_folder("~/new") == tmp_path / "new"


def test_bad_bytes_are_named_by_offset(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    for content, offset, word in (
        (b"", None, "empty"),
        (b"abc\0def", 3, "byte 3 is NUL"),
        (b"abc\xffdef", 3, r"byte 3 \(0xff\) is not valid UTF-8"),
        ("héé".encode()[:-1], 3, r"byte 3 \(0xc3\) is not valid UTF-8"),
        (b"x" * 10_000 + b"\xe2\x82", 10_000, r"byte 10000 \(0xe2\)"),
        ("€".encode() * 3000 + b"\0", 9000, "byte 9000 is NUL"),
    ):
        file.write_bytes(content)
        for piece in (1, 2, 7, 4096, 1 << 20):
            with pytest.raises(TextFileError, match=word) as caught:
                list(iter_text(file, piece))
            assert caught.value.path == file
            assert caught.value.offset == offset
            assert str(file) in str(caught.value)


def test_pieces_join_to_the_text_and_end_at_lines(tmp_path: Path) -> None:
    text = "".join(f"Zeile {i} äöü€𝄞\r\n  indented\n\nnext {i}\n" for i in range(400))
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    assert read_text(file) == text
    for size in (1, 3, 64, 1000, 1 << 20):
        pieces = list(iter_text(file, size))
        assert "".join(pieces) == text
        if size == 1000:
            assert len(pieces) > 5
            # Every piece ends behind a newline with no other white space beside it.
            for piece, following in pairwise(pieces):
                assert piece[-1] == "\n"
                assert not piece[-2].isspace()
                assert not following[0].isspace()


def test_a_line_without_end_is_still_read_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_text("word " * 10_000)
    pieces = list(iter_text(file, 100))
    assert "".join(pieces) == "word " * 10_000
    assert max(map(len, pieces)) < 1500
    file.write_text("x" * 50_000)
    assert max(map(len, iter_text(file, 100))) < 1500


def test_id_dtype_is_the_narrowest() -> None:
    for size, dtype in ((1, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65536, torch.uint16)):
        assert id_dtype(size) == dtype
    assert id_dtype(65537) == torch.int32
    with pytest.raises(ValueError, match="vocab_size is 0"):
        id_dtype(0)


@pytest.mark.parametrize("vocab_size", [256, 50_000, 100_000])
def test_corpus_holds_the_ids_in_every_dtype(tmp_path: Path, vocab_size: int) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 3)
    (tmp_path / "b.txt").write_text("klm")
    scale = (vocab_size - 1) // 255

    def encode(text: str) -> torch.Tensor:
        return torch.tensor([ord(c) * scale for c in text])

    corpus = write_corpus(
        text_files(tmp_path),
        encode,
        vocab_size=vocab_size,
        fingerprint="f",
        cache_dir=tmp_path / "cache",
        val_fraction=0.4,
        eos_id=7,
    )
    a, b = [ord(c) * scale for c in "abcdefghij" * 3] + [7], [ord(c) * scale for c in "klm"] + [7]
    train, validation = corpus.split("train"), corpus.split("validation")
    # int(31 * 0.6) = 18, int(4 * 0.6) = 2
    assert train.ids.dtype == id_dtype(vocab_size)
    assert train.ids.to(torch.int64).tolist() == a[:18] + b[:2]
    assert train.borders.tolist() == [0, 18, 20]
    assert validation.ids.to(torch.int64).tolist() == a[18:] + b[2:]
    assert validation.borders.tolist() == [0, 13, 15]
    assert corpus.tokens == {"train": 20, "validation": 15}
    with pytest.raises(ValueError, match="split is 'test'"):
        corpus.split("test")


def test_corpus_of_pieces_equals_corpus_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"Zeile {i} €\n" for i in range(2000))
    file = tmp_path / "t.txt"
    file.write_text(text)
    import ssm_modal.io.ids as ids

    monkeypatch.setattr(ids, "iter_text", lambda f: iter_text(f, 500))
    monkeypatch.setattr(ids, "_COPY_BYTES", 37)
    tokenizer = CharTokenizer.from_text(text)
    corpus = corpus_of([file], tokenizer, tmp_path / "cache", val_fraction=0.25)
    expected = tokenizer.encode(text)
    cut = int(len(expected) * 0.75)
    assert corpus.split("train").ids.tolist() == expected[:cut]
    assert corpus.split("validation").ids.tolist() == expected[cut:]


def test_corpus_is_found_again_and_keyed_by_content(tmp_path: Path) -> None:
    file, cache = tmp_path / "t.txt", tmp_path / "cache"
    file.write_text("some text")
    calls = 0

    def encode(text: str) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ByteTokenizer().encode_ids(text)

    def build(fingerprint: str = "f", val_fraction: float = 0.5):
        return write_corpus(
            [file],
            encode,
            vocab_size=256,
            fingerprint=fingerprint,
            cache_dir=cache,
            val_fraction=val_fraction,
        )

    first = build()
    assert build().folder == first.folder
    assert calls == 1
    renamed = file.rename(tmp_path / "other.txt")
    os.symlink(renamed, file)
    assert build().folder == first.folder
    folders = {first.folder, build("g").folder, build(val_fraction=0.25).folder}
    renamed.write_text("some texT")
    folders.add(build().folder)
    assert len(folders) == 4
    assert calls == 4
    # A damaged cache is reported, never used.
    (first.folder / "train.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train\.bin holds 1 bytes, expected 4 ids"):
        open_corpus(first.folder)


def test_nothing_is_left_when_encoding_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, cache = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "cache"
    good.write_text("text")
    bad.write_bytes(b"te\0xt")
    with pytest.raises(TextFileError, match="NUL"):
        corpus_of([good, bad], ByteTokenizer(), cache)
    bad.write_bytes(b"")
    with pytest.raises(TextFileError, match="empty"):
        corpus_of([good, bad], ByteTokenizer(), cache)
    with pytest.raises(ValueError, match=r"a\.txt: the tokenizer gave id 120, expected 0 to 99"):
        write_corpus(
            [good],
            ByteTokenizer().encode_ids,
            vocab_size=100,
            fingerprint="f",
            cache_dir=cache,
            val_fraction=0.0,
        )

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            corpus_of([good], ByteTokenizer(), cache)
    assert list(cache.iterdir()) == []


def test_load_ids_maps_and_never_writes_back(tmp_path: Path) -> None:
    file = tmp_path / "ids.bin"
    file.write_bytes(bytes([1, 0, 2, 0, 255, 255]))
    ids = load_ids(file, torch.uint16)
    assert ids.to(torch.int64).tolist() == [1, 2, 65535]
    ids[0] = 9
    assert file.read_bytes() == bytes([1, 0, 2, 0, 255, 255])
    with pytest.raises(ValueError, match="6 bytes, expected a multiple of 4"):
        load_ids(file, torch.int32)
    with pytest.raises(FileNotFoundError, match="no such file of ids"):
        load_ids(tmp_path / "gone.bin", torch.uint8)
    file.write_bytes(b"")
    assert load_ids(file, torch.uint8).shape == (0,)


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder" / "file.json"
    atomic_write(file, "old €")
    assert file.read_text(encoding="utf-8") == "old €"
    assert file.stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(file, "new")
    assert file.read_text(encoding="utf-8") == "old €"
    assert list(file.parent.iterdir()) == [file]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

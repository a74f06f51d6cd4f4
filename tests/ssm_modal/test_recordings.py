"""Recordings and labels: folders, patterns, manifests, presets with their splits, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("soundfile")

from ssm_modal.io.audio import AudioError
from ssm_modal.io.manifests import ManifestError, read_manifest
from ssm_modal.io.recordings import Reading, Recording, assign_splits, find_recordings, open_recordings
from ssm_modal.io.speech_presets import TEN_WORDS, WORDS, free_spoken_digits, speech_commands
from ssm_modal.io.wav import write_wav


def tone(path: Path, frames: int = 80, rate: int = 8000) -> Path:
    return write_wav(path, 0.5 * torch.sin(torch.arange(frames) * 0.3 + 1), rate)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_labels_from_folders(tmp_path: Path) -> None:
    touch(
        *(tmp_path / n for n in ("dog/2.wav", "dog/deep/1.FLAC", "cat/a.mp3", "cat/notes.txt", "dog/.x.wav"))
    )
    found = find_recordings(tmp_path)
    assert [(r.path.relative_to(tmp_path).as_posix(), r.label) for r in found.recordings] == [
        ("cat/a.mp3", "cat"),
        ("dog/2.wav", "dog"),
        ("dog/deep/1.FLAC", "dog"),
    ]
    touch(tmp_path / "loose.ogg")
    with pytest.raises(AudioError, match=r"loose\.ogg: has no label: it stands in .* itself"):
        find_recordings(tmp_path)
    found = find_recordings(tmp_path, skip_bad=True)
    assert (len(found.recordings), [b.path.name for b in found.left_out]) == (3, ["loose.ogg"])
    assert [r.label for r in find_recordings(tmp_path, "none").recordings] == [None] * 4
    touch(tmp_path / "empty" / "x.txt")
    with pytest.raises(
        FileNotFoundError, match=r"no file below it ends in \.wav or \.flac or \.ogg or \.mp3"
    ):
        find_recordings(tmp_path / "empty")


def test_labels_from_names(tmp_path: Path) -> None:
    touch(tmp_path / "anna-yes-3.wav", tmp_path / "ben-no-1.wav")
    one = find_recordings(tmp_path, "pattern", pattern=r"-(\w+)-").recordings
    assert [(r.path.name, r.label, r.speaker) for r in one] == [
        ("anna-yes-3.wav", "yes", None),
        ("ben-no-1.wav", "no", None),
    ]
    two = find_recordings(tmp_path, "pattern", pattern=r"^(?P<speaker>\w+)-(?P<label>\w+)-\d").recordings
    assert [(r.speaker, r.label) for r in two] == [("anna", "yes"), ("ben", "no")]
    with pytest.raises(AudioError, match=r"ben-no-1\.wav: has no label: its name does not fit the pattern"):
        find_recordings(tmp_path, "pattern", pattern="(yes)")
    found = find_recordings(tmp_path, "pattern", pattern="(yes)", skip_bad=True)
    assert [b.path.name for b in found.left_out] == ["ben-no-1.wav"]
    for pattern, word in (("(", "no regular expression"), ("a", "0 groups"), ("(a)(b)", "2 groups")):
        with pytest.raises(ValueError, match=word):
            find_recordings(tmp_path, "pattern", pattern=pattern)
    with pytest.raises(ValueError, match="expected both or neither"):
        find_recordings(tmp_path, "folder", pattern="(a)")
    with pytest.raises(AudioError, match="gives it the split 'yes', expected one of train, validation, test"):
        find_recordings(tmp_path, "pattern", pattern=r"(?P<label>\w+)-(?P<split>\w+)-")


def test_manifest(tmp_path: Path) -> None:
    touch(tmp_path / "a b.wav", tmp_path / "sub" / "c.flac")
    manifest = tmp_path / "list.csv"
    manifest.write_text(
        'split, path,label,start,end\ntrain,"a b.wav","x, y",,\ntest,sub/c.flac,z,0.5,1.25\n,a b.wav,z,2,\n',
        encoding="utf-8-sig",
    )
    assert read_manifest(manifest).recordings == [
        Recording(tmp_path / "a b.wav", "x, y", "train"),
        Recording(tmp_path / "sub" / "c.flac", "z", "test", 0.5, 1.25),
        Recording(tmp_path / "a b.wav", "z", None, 2.0, None),
    ]
    manifest.write_text("path,label\nc.flac,z\n")
    assert read_manifest(manifest, tmp_path / "sub").recordings[0].path == tmp_path / "sub" / "c.flac"
    manifest.write_text("path\na b.wav\n")
    assert read_manifest(manifest, labelled=False).recordings == [Recording(tmp_path / "a b.wav")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("path,label\na.wav,x\ngone.wav,x\n", r"line 3: '.*gone\.wav': there is no such file"),
        ("path,label\na.wav,\n", r"line 2: the label of 'a\.wav' is missing"),
        ("path,label\n,x\n", "line 2: the path is empty"),
        ("path,label\na.wav\n", r"line 2: 1 cells, expected 2 \(path, label\)"),
        ("path,label,split\na.wav,x,valid\n", "line 2: the split is 'valid', expected one of train"),
        ("path,label,start\na.wav,x,soon\n", "line 2: the start is 'soon', expected seconds"),
        ("path,label,start,end\na.wav,x,2,1\n", r"line 2: the part from 2\.0 to 1\.0 s is no span"),
        ("path,label,start\na.wav,x,nan\n", "line 2: the part from nan to None s is no span"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, content: str, problem: str) -> None:
    touch(tmp_path / "a.wav")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ManifestError, match=rf"list\.csv: {problem}"):
        read_manifest(tmp_path / "list.csv")
    found = read_manifest(tmp_path / "list.csv", skip_bad=True)
    assert len(found.recordings) + 1 == len(content.splitlines()) - 1
    assert [b.reason.startswith("line ") for b in found.left_out] == [True]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("path,lable\na.wav,x\n", "line 1: unknown column 'lable'; did you mean 'label'"),
        ("path\na.wav\n", "line 1: the column 'label' is missing"),
        ("path,label,path\n", "line 1: the column 'path' is there twice"),
        ("path,label\n", "line 2: there is none"),
        ("", "line 1: the column 'path' is missing"),
        (b"path,label\n\xff\xfe,x\n", "is no CSV file in UTF-8"),
    ],
)
def test_a_manifest_with_a_bad_header_is_refused(tmp_path: Path, content: str | bytes, problem: str) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for skip_bad in (False, True):
        with pytest.raises(ManifestError, match=rf"list\.csv: {problem}"):
            read_manifest(file, skip_bad=skip_bad)
    with pytest.raises(FileNotFoundError, match=r"manifest is '.*gone"):
        read_manifest(tmp_path / "gone.csv")


def test_splits_are_even_and_keep_files_together() -> None:
    many = [Recording(Path(f"/data/{label}/{i}.wav"), label) for label in "ab" for i in range(30)]
    done = assign_splits(many, 0.1, 0.2)
    assert Counter((r.label, r.split) for r in done) == {
        ("a", "train"): 21,
        ("b", "train"): 21,
        ("a", "validation"): 3,
        ("b", "validation"): 3,
        ("a", "test"): 6,
        ("b", "test"): 6,
    }
    # Neither the order nor the folder matters.
    other = assign_splits([Recording(Path("/x") / r.path.name, r.label) for r in reversed(many)], 0.1, 0.2)
    assert {(r.path.name, r.label, r.split) for r in other} == {(r.path.name, r.label, r.split) for r in done}
    parts = [
        Recording(Path(f"{i}.wav"), "ab"[k % 2], start=float(k), end=k + 1.0)
        for i in range(20)
        for k in range(5)
    ]
    kept = assign_splits(parts, 0.3, 0.3)
    assert len({(r.path, r.split) for r in kept}) == 20
    assert {r.split for r in kept} == {"train", "validation", "test"}
    given = [Recording(Path("a.wav"), "x", "test"), Recording(Path("b.wav"), "x")]
    assert [r.split for r in assign_splits(given, 0.0, 0.0)] == ["test", "train"]
    with pytest.raises(ValueError, match=r"sum to 1\.1"):
        assign_splits(given, 0.5, 0.6)
    with pytest.raises(ValueError, match=r"val_fraction is -0\.1"):
        assign_splits(given, -0.1)


def test_clips_are_checked_read_and_left_out(tmp_path: Path) -> None:
    good, late = tone(tmp_path / "good.wav", 80), tone(tmp_path / "late.wav", 80)
    silent = write_wav(tmp_path / "silent.wav", torch.zeros(40), 8000)
    recordings = [
        Recording(good, "a"),
        Recording(good, "b", start=0.001, end=0.003),
        Recording(late, "a", start=0.005, end=0.02),
        Recording(silent, "a"),
        Recording(tmp_path / "gone.wav", "a"),
        Recording(good, "a", start=0.001, end=0.00101),
    ]
    reading = Reading(8000, refuse_silent=True)
    clips, bad = open_recordings(recordings, reading, skip_bad=True)
    assert [(c.start, c.frames, c.recording.label) for c in clips] == [(0, 80, "a"), (8, 16, "b")]
    assert [b.path.name for b in bad] == ["late.wav", "silent.wav", "gone.wav", "good.wav"]
    assert "reaches beyond the file, which holds 80" in bad[0].reason
    assert "are 0" in bad[1].reason
    assert bad[2].reason == "there is no such file"
    assert "holds no frame" in bad[3].reason
    whole = clips[0].read()
    assert torch.equal(clips[1].read(), whole[8:24])
    assert torch.equal(clips[1].read(3, 5), whole[11:16])
    with pytest.raises(ValueError, match=r"samples 10 to 17 of .*: the clip has 16"):
        clips[1].read(10, 7)
    for one in recordings[2:]:
        with pytest.raises((AudioError, FileNotFoundError), match=one.path.name):
            open_recordings([one], reading)
    # At twice the rate a part has twice the frames.
    (twice,), _ = open_recordings(recordings[1:2], Reading(16000, resample=True))
    assert (twice.start, twice.frames, twice.read().shape) == (16, 32, (32,))
    assert len(open_recordings([recordings[3]], reading, decode=False)[0]) == 1


def test_free_spoken_digits_official_and_left_out(tmp_path: Path) -> None:
    for speaker in ("ann", "bob"):
        touch(*(tmp_path / f"{d}_{speaker}_{i}.wav" for d in (0, 7) for i in (0, 4, 5, 9, 10, 49)))
    official = free_spoken_digits(tmp_path).recordings
    assert len(official) == 24
    split = {(r.speaker, int(r.path.stem.split("_")[2])): r.split for r in official if r.label == "7"}
    for speaker in ("ann", "bob"):
        assert [split[speaker, i] for i in (0, 4, 5, 9, 10, 49)] == [
            *("test", "test", "validation", "validation", "train", "train")
        ]
    held = free_spoken_digits(tmp_path, "bob").recordings
    assert {r.split for r in held if r.speaker == "bob"} == {"test"}
    rest = {int(r.path.stem.split("_")[2]): r.split for r in held if r.speaker == "ann"}
    assert [rest[i] for i in (0, 4, 5, 9, 10, 49)] == [
        *("train", "train", "validation", "validation", "train", "train")
    ]
    touch(*(tmp_path / f"{d}_cid_{i}.wav" for d in (0, 7) for i in (0, 5, 10)))
    nested = free_spoken_digits(tmp_path, "bob", "ann").recordings
    assert {(r.speaker, r.split) for r in nested} == {
        *(("ann", "validation"), ("bob", "test"), ("cid", "train"))
    }
    for names, message in (
        (("eve",), "left_out_speaker is 'eve', expected one of ann, bob, cid"),
        (("ann", "eve"), "validation_speaker is 'eve', expected one of ann, bob, cid"),
        (("ann", "ann"), "validation_speaker is 'ann' with left_out_speaker 'ann', expected another"),
        ((None, "ann"), "validation_speaker is 'ann' with left_out_speaker None, expected another"),
    ):
        with pytest.raises(ValueError, match=message):
            free_spoken_digits(tmp_path, *names)
    touch(tmp_path / "seven_ann_1.wav")
    with pytest.raises(AudioError, match=r"seven_ann_1\.wav: has no label"):
        free_spoken_digits(tmp_path)
    assert len(free_spoken_digits(tmp_path, skip_bad=True).left_out) == 1


def test_speech_commands_official_split(tmp_path: Path) -> None:
    assert len(WORDS) == 35
    assert set(TEN_WORDS) < set(WORDS)
    for word in WORDS:
        touch(*(tmp_path / word / f"{who}_nohash_0.wav" for who in ("aa", "bb", "cc")))
    touch(tmp_path / "_background_noise_" / "pink.wav", tmp_path / "README.md")
    (tmp_path / "validation_list.txt").write_text("".join(f"{w}/bb_nohash_0.wav\n" for w in WORDS))
    (tmp_path / "testing_list.txt").write_text("".join(f"{w}/cc_nohash_0.wav\n" for w in WORDS))
    whole = speech_commands(tmp_path).recordings
    assert Counter(r.split for r in whole) == {"train": 35, "validation": 35, "test": 35}
    assert {(r.speaker, r.split) for r in whole} == {("aa", "train"), ("bb", "validation"), ("cc", "test")}
    assert {r.label for r in whole} == set(WORDS)
    ten = speech_commands(tmp_path, 10).recordings
    assert ({r.label for r in ten}, len(ten)) == (set(TEN_WORDS), 30)
    some = speech_commands(tmp_path, 10, unknown=True).recordings
    assert Counter(r.label for r in some)["_unknown_"] == 75
    assert len(some) == 105
    with pytest.raises(ValueError, match="words is 12"):
        speech_commands(tmp_path, 12)
    with pytest.raises(ValueError, match="no word is unknown"):
        speech_commands(tmp_path, unknown=True)
    (tmp_path / "wow" / "bb_nohash_0.wav").unlink()
    with pytest.raises(AudioError, match=r"wow/bb_nohash_0\.wav: there is no such file, but validation_list"):
        speech_commands(tmp_path)
    assert len(speech_commands(tmp_path, skip_bad=True).left_out) == 1
    assert len(speech_commands(tmp_path, 10).recordings) == 30
    (tmp_path / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"testing_list\.txt': there is no such list"):
        speech_commands(tmp_path)


def test_the_real_digits_have_their_published_counts() -> None:
    root = os.environ.get("SSM_MODAL_DATA")
    if root is None:
        pytest.skip("set SSM_MODAL_DATA to the folder that holds audio/fsdd/recordings")
    folder = Path(root) / "audio" / "fsdd" / "recordings"
    official = free_spoken_digits(folder).recordings
    assert Counter(r.split for r in official) == {"train": 2400, "validation": 300, "test": 300}
    clips, _ = open_recordings([r for r in official if r.split == "test"], Reading(8000, refuse_silent=True))
    assert sum(clip.frames for clip in clips) == 1_034_030
    held = free_spoken_digits(folder, "theo").recordings
    assert Counter(r.split for r in held) == {"train": 2250, "validation": 250, "test": 500}

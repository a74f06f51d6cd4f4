"""Labelled recordings: found in a folder, split, and opened as clips whose headers have been read.

Where `skip_bad` is false the first bad file is an error; where it is true bad files are left out and listed,
each with the reason.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from ssm_modal.io.audio import AUDIO_SUFFIXES, AudioError, check_audio, read_audio
from ssm_modal.io.text import expand_path, text_files

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Recording:
    """A file, or a part of one, with what is known of it.

    label: its class, None where there is none. split: "train", "validation" or "test", None: not decided.
    start, end: the part in seconds, `end` None: to the end of the file. speaker: who speaks, where known.
    """

    path: Path
    label: str | None = None
    split: str | None = None
    start: float = 0.0
    end: float | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A file that was left out, and why."""

    path: Path
    reason: str


@dataclass
class Found:
    """Recordings, and what was left out on the way to them."""

    recordings: list[Recording]
    left_out: list[LeftOut] = field(default_factory=list)


def find_recordings(
    path: str | os.PathLike[str],
    labels: Literal["folder", "pattern", "none"] = "folder",
    *,
    pattern: str | None = None,
    suffixes: Sequence[str] = AUDIO_SUFFIXES,
    skip_bad: bool = False,
) -> Found:
    """The recordings in the folder `path`, in the order of their relative paths, with their labels.

    labels: "folder": the first folder below `path` that a file stands in. "pattern": the group `label`, or
        the only group, of the regular expression `pattern`, searched in the file's name; groups `speaker` and
        `split` are taken too where it has them. "none": no labels.
    suffixes: endings of the files that are taken.

    Raises FileNotFoundError where there is no file, NotADirectoryError where labels by folder are asked of a
    file, AudioError for a file without a label (or left out), ValueError for a pattern that is no regular
    expression or has no group for the label.
    """
    if labels not in ("folder", "pattern", "none"):
        raise ValueError(f'labels is {labels!r}, expected "folder", "pattern" or "none"')
    if (labels == "pattern") != (pattern is not None):
        raise ValueError(f"labels is {labels!r} and pattern is {pattern!r}, expected both or neither")
    regex = None if pattern is None else _compiled(pattern)
    root = expand_path(path)
    if labels == "folder" and root.is_file():
        raise NotADirectoryError(
            f"path is {str(root)!r}, a file, expected a folder with a folder a label in it"
        )
    found = Found([])
    for file in text_files(root, suffixes):
        try:
            if regex is not None:
                found.recordings.append(_by_pattern(file, regex))
            elif labels == "none":
                found.recordings.append(Recording(file))
            else:
                inside = file.relative_to(root).parts
                if len(inside) < 2:
                    raise AudioError(
                        file,
                        f"has no label: it stands in {root} itself, expected a folder named by the label",
                    )
                found.recordings.append(Recording(file, inside[0]))
        except AudioError as error:
            if not skip_bad:
                raise
            found.left_out.append(LeftOut(file, error.problem))
    return found


def assign_splits(
    recordings: Sequence[Recording], val_fraction: float = 0.1, test_fraction: float = 0.1
) -> list[Recording]:
    """`recordings` with a split for those that have none.

    Of each label's files, in the order of a hash of their name, the first `floor(n * test_fraction)` are
    "test", the next `floor(n * val_fraction)` "validation", the rest "train": the same on every machine,
    whatever folder they stand in. Parts of one file always go together.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"{name} is {fraction}, expected at least 0 and less than 1")
    if val_fraction + test_fraction >= 1.0:
        raise ValueError(
            f"val_fraction and test_fraction sum to {val_fraction + test_fraction}, expected less than 1"
        )
    by_label: dict[str | None, dict[Path, None]] = {}
    seen: set[Path] = set()
    for recording in recordings:
        if recording.split is None and recording.path not in seen:
            seen.add(recording.path)
            by_label.setdefault(recording.label, {})[recording.path] = None
    split_of: dict[Path, str] = {}
    for files in by_label.values():
        order = sorted(files, key=lambda file: (hashlib.sha256(file.name.encode()).digest(), file))
        # A hair above, so that 0.1 * 30 counts as the 3 that is meant.
        tests = math.floor(len(order) * test_fraction + 1e-9)
        held = tests + math.floor(len(order) * val_fraction + 1e-9)
        for at, file in enumerate(order):
            split_of[file] = "test" if at < tests else "validation" if at < held else "train"
    return [r if r.split is not None else replace(r, split=split_of[r.path]) for r in recordings]


@dataclass(frozen=True)
class Reading:
    """How recordings are read; the fields mean what they do in `read_audio`."""

    sample_rate: int
    resample: bool = False
    mono: bool = False
    refuse_silent: bool = False


@dataclass(frozen=True)
class Clip:
    """A recording found fit to read: `frames` from `start` on, both counted at `reading.sample_rate`."""

    recording: Recording
    reading: Reading
    start: int
    frames: int

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """`count` samples from `first` on, of the clip, (count,) float32. None: the rest."""
        count = self.frames - first if count is None else count
        if first < 0 or count < 1 or first + count > self.frames:
            raise ValueError(
                f"samples {first} to {first + count} of {self.recording.path}: the clip has {self.frames}"
            )
        whole = count == self.frames
        return read_audio(
            self.recording.path,
            self.start + first,
            count,
            sample_rate=self.reading.sample_rate,
            resample=self.reading.resample,
            mono=self.reading.mono,
            refuse_silent=self.reading.refuse_silent and whole,
        )


def open_recordings(
    recordings: Sequence[Recording], reading: Reading, *, decode: bool = True, skip_bad: bool = False
) -> tuple[list[Clip], list[LeftOut]]:
    """The clips of `recordings`, in order, and what was left out.

    decode: read every sample once, so that a corrupt file, a NaN or silence is found now and not in the
        middle of a run; otherwise the headers alone.

    Raises FileNotFoundError and AudioError, which name the file, unless `skip_bad`.
    """
    clips, left_out = [], []
    for recording in recordings:
        try:
            clips.append(_open(recording, reading, decode))
        except (AudioError, FileNotFoundError) as error:
            if not skip_bad:
                raise
            reason = error.problem if isinstance(error, AudioError) else "there is no such file"
            left_out.append(LeftOut(recording.path, reason))
    return clips, left_out


def _open(recording: Recording, reading: Reading, decode: bool) -> Clip:
    rate = reading.sample_rate
    start = round(recording.start * rate)
    count = None if recording.end is None else round(recording.end * rate) - start
    if count is not None and count < 1:
        raise AudioError(
            recording.path,
            f"the part from {recording.start} to {recording.end} s holds no frame at {rate} Hz",
        )
    info = check_audio(
        recording.path,
        start,
        count,
        sample_rate=rate,
        resample=reading.resample,
        mono=reading.mono,
        refuse_silent=reading.refuse_silent,
        decode=decode,
    )
    return Clip(recording, reading, start, info.frames_at(rate) - start if count is None else count)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern is {pattern!r}, which is no regular expression: {error}") from None
    if "label" not in regex.groupindex and regex.groups != 1:
        raise ValueError(
            f"pattern is {pattern!r} with {regex.groups} groups, expected one, or one named (?P<label>...)"
        )
    return regex


def _by_pattern(file: Path, regex: re.Pattern[str]) -> Recording:
    match = regex.search(file.name)
    named = match.groupdict() if match else {}
    label = (named.get("label") if "label" in regex.groupindex else match.group(1)) if match else None
    if not label:
        raise AudioError(file, f"has no label: its name does not fit the pattern {regex.pattern!r}")
    split = named.get("split")
    if split is not None and split not in SPLITS:
        raise AudioError(
            file, f"the pattern gives it the split {split!r}, expected one of {', '.join(SPLITS)}"
        )
    return Recording(file, label, split, speaker=named.get("speaker"))

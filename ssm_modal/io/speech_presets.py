"""Published sets of spoken words with their official splits: Free Spoken Digits and Speech Commands."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from ssm_modal.io.audio import AudioError
from ssm_modal.io.recordings import Found, LeftOut, Recording, find_recordings
from ssm_modal.io.text import expand_path

DIGIT_NAME = r"^(?P<label>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.wav$"
TEN_WORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
WORDS = tuple(
    sorted(
        (
            *TEN_WORDS,
            *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            *("backward", "bed", "bird", "cat", "dog", "follow", "forward", "happy", "house", "learn"),
            *("marvin", "sheila", "tree", "visual", "wow"),
        )
    )
)
UNKNOWN = "_unknown_"
_LISTS = (("validation_list.txt", "validation"), ("testing_list.txt", "test"))


def free_spoken_digits(
    path: str | os.PathLike[str],
    left_out_speaker: str | None = None,
    validation_speaker: str | None = None,
    *,
    skip_bad: bool = False,
) -> Found:
    """Free Spoken Digits (`{digit}_{speaker}_{index}.wav`) in the folder `path`, label: the digit.

    The official split of the data set: index 0-4 "test"; of the rest 5-9 "validation", 10-49 "train".
    With `left_out_speaker` all recordings of that speaker are "test" and no others: the other speakers' 5-9
    are "validation", their rest, 0-4 with them, "train". With `validation_speaker` too all recordings of that
    one are "validation" and no others, and of the remaining speakers everything is "train": a choice made by
    a speaker unheard in training, while nothing of the one left out is looked at.

    Raises as `find_recordings`, and ValueError for a speaker who is not there, naming those who are, for the
    same speaker twice, and for a `validation_speaker` without a `left_out_speaker`.
    """
    regex = re.compile(DIGIT_NAME)
    found = find_recordings(path, "pattern", pattern=DIGIT_NAME, suffixes=(".wav",), skip_bad=skip_bad)
    speakers = {r.speaker for r in found.recordings if r.speaker is not None}
    for name, speaker in (("left_out_speaker", left_out_speaker), ("validation_speaker", validation_speaker)):
        if speaker is not None and speaker not in speakers:
            raise ValueError(f"{name} is {speaker!r}, expected one of {', '.join(sorted(speakers))}")
    if validation_speaker is not None and left_out_speaker in (None, validation_speaker):
        raise ValueError(
            f"validation_speaker is {validation_speaker!r} with left_out_speaker {left_out_speaker!r}, "
            "expected another speaker left out: what the test is to be made on"
        )

    def split(recording: Recording) -> str:
        match = regex.match(recording.path.name)
        assert match is not None
        index = int(match["index"])
        if left_out_speaker is not None and recording.speaker == left_out_speaker:
            return "test"
        if validation_speaker is not None:
            return "validation" if recording.speaker == validation_speaker else "train"
        if 5 <= index < 10:
            return "validation"
        return "test" if index < 5 and left_out_speaker is None else "train"

    return Found([replace(r, split=split(r)) for r in found.recordings], found.left_out)


def speech_commands(
    path: str | os.PathLike[str], words: int = 35, *, unknown: bool = False, skip_bad: bool = False
) -> Found:
    """Speech Commands version 0.02 (Warden, arXiv 1804.03209) in the folder `path`, label: the word.

    Official split: what `validation_list.txt` and `testing_list.txt` name is "validation" and "test", every
    other recording "train". `_background_noise_` is left out.

    words: 35: all of them. 10: down, go, left, no, off, on, right, stop, up, yes; the other words' recordings
        are left out, or with `unknown` labelled "_unknown_".

    Raises FileNotFoundError for a missing list or a word without a folder, AudioError for a recording that a
    list names and that is not there (or left out).
    """
    if words not in (35, 10):
        raise ValueError(f"words is {words}, expected 35 or 10")
    if unknown and words == 35:
        raise ValueError("unknown is True with 35 words, expected 10: no word is unknown among all of them")
    root = expand_path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"path is {str(root)!r}: there is no such folder")
    wanted = WORDS if words == 35 or unknown else TEN_WORDS
    left_out: list[LeftOut] = []
    splits: dict[str, str] = {}
    lists = [(name, split, _list(root / name)) for name, split in _LISTS]
    for name, split, lines in lists:
        for line, inside in enumerate(lines, 1):
            if inside.split("/")[0] not in wanted:
                continue
            splits[inside] = split
            if not (root / inside).is_file():
                problem = f"there is no such file, but {name} names it in line {line}"
                if not skip_bad:
                    raise AudioError(root / inside, problem)
                left_out.append(LeftOut(root / inside, problem))
    recordings = []
    for word in wanted:
        if not (root / word).is_dir():
            raise FileNotFoundError(
                f"{str(root / word)!r}: there is no such folder, expected the word's recordings"
            )
        label = word if words == 35 or word in TEN_WORDS else UNKNOWN
        for file in sorted((root / word).glob("*.wav")):
            speaker = file.name.split("_nohash_")[0]
            split = splits.get(f"{word}/{file.name}", "train")
            recordings.append(Recording(file, label, split, speaker=speaker))
    return Found(recordings, left_out)


def _list(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r}: there is no such list, expected the official one of Speech Commands"
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]

"""Reading audio files (WAV, FLAC, OGG, MP3): their headers, and the windows of samples that are asked for.

Samples are float32 at a fixed scale, never normalised file by file: 16-bit PCM is x / 32768, 24-bit PCM
x / 2^23, float WAV as it stands. soundfile decodes and torchaudio resamples (extra `audio`); both are
imported where they are used.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.resampling import read_resampled, resampled_frames

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# Frames decoded at once while a file is checked.
_BLOCK = 1 << 20
# The longest an OGG page can be.
_OGG_PAGE = 65307
# An MP3 frame takes bits from frames before it: where decoding begins in the middle, what comes first is
# wrong. The bits reach back up to 511 bytes; 2^14 samples sufficed at every bit rate that was tried.
_MP3_BEFORE = 1 << 15
# Programs that write to a pipe cannot know the size and leave one near the largest, or 0.
_SIZE_UNKNOWN = 0x7FFFF000


class AudioError(ValueError):
    """An audio file that cannot be used: empty, corrupt, silent, or other than what was expected.

    path: the file. problem: what came and what was expected, without the path.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        self.path, self.problem = Path(path), problem
        super().__init__(f"{self.path}: {problem}")

    def __reduce__(self) -> tuple[type[AudioError], tuple[Path, str]]:
        # Raised in a worker process, the error travels to the one that trains.
        return type(self), (self.path, self.problem)


@dataclass(frozen=True)
class AudioFile:
    """What a file's header says.

    sample_rate: frames a second. frames: samples of each channel. format, subtype: as soundfile names them,
    for example "WAV" and "PCM_16".
    """

    path: Path
    sample_rate: int
    frames: int
    channels: int
    format: str
    subtype: str

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate

    def frames_at(self, sample_rate: int) -> int:
        """Frames of the whole file when it is resampled to `sample_rate`."""
        return resampled_frames(self.frames, self.sample_rate, sample_rate)


def audio_info(path: str | os.PathLike[str]) -> AudioFile:
    """The header of the audio file `path`; no sample is decoded.

    Raises FileNotFoundError, and AudioError for a file that is empty (also: a header and 0 frames), cut
    short, or in no format that can be read.
    """
    with _opened(Path(path)) as (info, _):
        return info


def read_audio(
    path: str | os.PathLike[str],
    start: int = 0,
    frames: int | None = None,
    *,
    sample_rate: int | None = None,
    resample: bool = False,
    mono: bool = False,
    channels: int | None = 1,
    refuse_silent: bool = False,
) -> Tensor:
    """The samples of `path` in a window, float32: (frames,) of one channel, else (frames, channels).

    Only the window is decoded, and when resampling what the filter reaches on either side of it; the result
    is, to rounding, that window of the whole resampled file.

    Args:
        path: the file.
        start: the first frame of the window, counted at the rate of the result.
        frames: frames of the window, at the rate of the result; None: to the end.
        sample_rate: frames a second expected; None: whatever the file has.
        resample: make a file of another rate `sample_rate`; otherwise it is an error.
        mono: average the channels; otherwise they come as they are.
        channels: how many the file is expected to have, not used with `mono`; None: any number.
        refuse_silent: a window whose samples are all 0 is an error.

    Raises FileNotFoundError, and AudioError naming the file, what came and what was expected: an empty or
    corrupt file, a rate or a number of channels other than expected, a window that reaches beyond the file,
    a NaN or infinite sample, silence where it is refused.
    """
    _check_window(start, frames)
    with _opened(Path(path)) as (info, source):
        rate = _check_header(info, sample_rate, resample, mono, channels)
        total = info.frames_at(rate)
        stop = _window_end(info, start, frames, total, rate)
        if rate == info.sample_rate:
            wave = _decode(info, source, start, stop)
        else:

            def read(first: int, last: int) -> Tensor:
                return _decode(info, source, first, last)

            wave = read_resampled(
                read, info.frames, info.sample_rate, rate, start, stop, channels=info.channels
            )
    if refuse_silent and not wave.any():
        raise AudioError(path, _silent(start, stop))
    if mono:
        return wave.mean(1) if info.channels > 1 else wave[:, 0]
    return wave[:, 0] if info.channels == 1 else wave


def check_audio(
    path: str | os.PathLike[str],
    start: int = 0,
    frames: int | None = None,
    *,
    sample_rate: int | None = None,
    resample: bool = False,
    mono: bool = False,
    channels: int | None = 1,
    refuse_silent: bool = False,
    decode: bool = True,
) -> AudioFile:
    """Raise what `read_audio` would, in the memory of one block and without resampling; returns the header.

    With `decode` false the samples are left alone: the header, the rate, the channels and the window only.
    """
    _check_window(start, frames)
    with _opened(Path(path)) as (info, source):
        rate = _check_header(info, sample_rate, resample, mono, channels)
        stop = _window_end(info, start, frames, info.frames_at(rate), rate)
        if decode:
            first = start * info.sample_rate // rate
            last = min(info.frames, -(-stop * info.sample_rate // rate))
            silent = True
            for at in range(first, last, _BLOCK):
                silent = not _decode(info, source, at, min(at + _BLOCK, last)).any() and silent
            if refuse_silent and silent:
                raise AudioError(path, _silent(start, stop))
    return info


def _check_window(start: int, frames: int | None) -> None:
    if start < 0:
        raise ValueError(f"start is {start}, expected 0 or more frames")
    if frames is not None and frames < 1:
        raise ValueError(f"frames is {frames}, expected 1 or more, or None for all to the end")


def _window_end(info: AudioFile, start: int, frames: int | None, total: int, rate: int) -> int:
    stop = total if frames is None else start + frames
    if stop > total or start >= total:
        raise AudioError(
            info.path,
            f"the window of frames {start} to {stop if frames is not None else 'the end'} reaches beyond the "
            f"file, which holds {total} at {rate} Hz",
        )
    return stop


def _check_header(
    info: AudioFile, sample_rate: int | None, resample: bool, mono: bool, channels: int | None
) -> int:
    """The rate of the result; raises AudioError where the file does not fit."""
    if sample_rate is not None and sample_rate < 1:
        raise ValueError(f"sample_rate is {sample_rate}, expected 1 or more frames a second")
    if resample and sample_rate is None:
        raise ValueError("resample is True, expected a sample_rate to resample to")
    if not mono and channels is not None and info.channels != channels:
        raise AudioError(
            info.path,
            f"the file has {info.channels} channel{'s' if info.channels > 1 else ''}, expected {channels}"
            + ("; mono=True averages them" if channels == 1 else ""),
        )
    if sample_rate is None:
        return info.sample_rate
    if info.sample_rate != sample_rate and not resample:
        raise AudioError(
            info.path,
            f"the sample rate is {info.sample_rate} Hz, expected {sample_rate} Hz; resample=True makes it so",
        )
    return sample_rate


def _silent(start: int, stop: int) -> str:
    return f"all samples of frames {start} to {stop} are 0, expected a recording that is not silent"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[AudioFile, Any]]:
    """The header of `path` and the soundfile object, closed at the end."""
    soundfile = load_soundfile()
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}: there is no such audio file")
    if path.stat().st_size == 0:
        raise AudioError(path, "the file is empty (0 bytes), expected audio")
    try:
        source = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, TypeError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        if reason.startswith("File does not exist"):  # what libsndfile says of an MP3 that is cut short
            reason = "broken or cut short"
        raise AudioError(
            path, f"cannot be read as audio ({reason.rstrip('.')}), expected WAV, FLAC, OGG or MP3"
        ) from error
    with source:
        if source.frames == 0:
            raise AudioError(path, "the file holds 0 frames, expected some")
        if source.format in ("WAV", "WAVEX"):
            _check_whole_wav(path)
        elif source.format == "OGG":
            _check_whole_ogg(path)
        yield (
            AudioFile(path, source.samplerate, source.frames, source.channels, source.format, source.subtype),
            source,
        )


def load_soundfile() -> Any:
    """The module soundfile; raises ImportError naming the command that mends it where it is missing."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("audio files need soundfile: pip install 'ssm-modal[audio]'") from error
    return soundfile


def _check_whole_wav(path: Path) -> None:
    """Raise AudioError where a WAV file ends before the size its header gives; libsndfile would not say."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            here = file.tell()
            if name == b"data":
                if here + length > size and length < _SIZE_UNKNOWN:
                    raise AudioError(
                        path, f"the file is cut short: it holds {size - here} of {length} bytes of samples"
                    )
                return
            file.seek(here + length + length % 2)


def _check_whole_ogg(path: Path) -> None:
    """Raise AudioError where an OGG file's last page is not marked as the end; libsndfile would not say."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _OGG_PAGE))
        tail = file.read()
    at = tail.rfind(b"OggS")
    # Byte 5 of a page's header holds its flags, 4 for the last page of the stream (RFC 3533).
    if at < 0 or at + 5 >= len(tail) or not tail[at + 5] & 4:
        raise AudioError(path, "the file is cut short: its last page is not marked as the end of the stream")


def _decode(info: AudioFile, source: Any, start: int, stop: int) -> Tensor:
    """Frames [start, stop) at the file's own rate, (stop - start, channels) float32, all of them finite."""
    soundfile = load_soundfile()
    try:
        before = 0
        if source.tell() != start:
            before = min(start, _MP3_BEFORE) if info.format == "MP3" else 0
            source.seek(start - before)
        raw = source.read(before + stop - start, dtype="float32", always_2d=True)[before:]
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", None) or "the decoder gives no reason"
        raise AudioError(
            info.path, f"corrupt: frames {start} to {stop} cannot be decoded ({reason.rstrip('.')})"
        ) from error
    wave = torch.from_numpy(raw)
    if wave.shape[0] != stop - start:
        raise AudioError(
            info.path,
            f"corrupt: the samples end at frame {start + wave.shape[0]}, the header gives {info.frames}",
        )
    bad = ~torch.isfinite(wave)
    if bad.any():
        frame, channel = bad.nonzero()[0].tolist()
        raise AudioError(
            info.path,
            f"frame {start + frame} is {wave[frame, channel].item()}"
            + (f" in channel {channel}" if info.channels > 1 else "")
            + f" ({int(bad.sum())} such samples in frames {start} to {stop}), expected finite numbers",
        )
    return wave

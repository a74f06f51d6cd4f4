"""Reading and writing audio: the scale, the windows, resampling, and errors that name the file."""

from __future__ import annotations

import errno
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("soundfile")

import soundfile as sf

from ssm_modal.io.audio import AudioError, audio_info, check_audio, read_audio
from ssm_modal.io.resampling import read_resampled, resampled_frames
from ssm_modal.io.wav import write_wav


def noise(frames: int, *channels: int) -> torch.Tensor:
    return torch.rand(frames, *channels) * 1.6 - 0.8


def write(path: Path, data: torch.Tensor, rate: int = 8000, subtype: str | None = None) -> Path:
    sf.write(path, data.numpy(), rate, subtype=subtype)
    return path


def test_every_format_comes_at_its_fixed_scale(tmp_path: Path) -> None:
    ints = torch.tensor([-32768, -1, 0, 1, 16384, 32767], dtype=torch.int16)
    for name in ("a.wav", "a.flac"):
        wave = read_audio(write(tmp_path / name, ints, subtype="PCM_16"))
        assert wave.dtype == torch.float32
        assert wave.tolist() == [-1.0, -1 / 32768, 0.0, 1 / 32768, 0.5, 32767 / 32768]
    wide = torch.tensor([-(2**23), -1, 0, 1, 2**22, 2**23 - 1], dtype=torch.int32)
    for name in ("b.wav", "b.flac"):
        wave = read_audio(write(tmp_path / name, wide * 256, subtype="PCM_24"))
        assert wave.tolist() == [-1.0, -(2.0**-23), 0.0, 2.0**-23, 0.5, 1 - 2.0**-23]
    floats = torch.tensor([-1.5, 1e-6, 0.25, 3.0])
    assert torch.equal(read_audio(write(tmp_path / "c.wav", floats, subtype="FLOAT")), floats)
    # Quiet files stay quiet: nothing is normalised.
    quiet = torch.tensor([3, -2, 1], dtype=torch.int16)
    assert read_audio(write(tmp_path / "d.wav", quiet)).tolist() == [3 / 32768, -2 / 32768, 1 / 32768]


@pytest.mark.parametrize("ending", ["ogg", "mp3"])
def test_lossy_formats_keep_scale_and_windows(tmp_path: Path, ending: str) -> None:
    if ending.upper() not in sf.available_formats():
        pytest.skip(f"this libsndfile writes no {ending}")
    wave = 0.5 * torch.sin(torch.arange(80_000) * 0.05)
    file = write(tmp_path / f"a.{ending}", wave, 16000)
    whole = read_audio(file, sample_rate=16000)
    assert whole.shape == (80_000,)
    assert (whole - wave)[500:-500].abs().max() < 0.05
    for start, frames in ((0, 10), (1234, 777), (5000, 3000), (70_001, 500), (79_990, 10)):
        torch.testing.assert_close(
            read_audio(file, start, frames), whole[start : start + frames], rtol=0, atol=1e-6
        )


def test_header_without_samples(tmp_path: Path) -> None:
    file = write(tmp_path / "a.flac", noise(4001, 2), 22050, "PCM_24")
    info = audio_info(file)
    assert (info.sample_rate, info.frames, info.channels, info.subtype) == (22050, 4001, 2, "PCM_24")
    assert info.seconds == 4001 / 22050
    assert (info.frames_at(22050), info.frames_at(44100), info.frames_at(16000)) == (4001, 8002, 2904)


def test_windows_and_channels(tmp_path: Path) -> None:
    data = noise(1000, 2)
    file = write(tmp_path / "a.wav", data, subtype="FLOAT")
    assert torch.equal(read_audio(file, 100, 50, channels=None), data[100:150])
    assert torch.equal(read_audio(file, 900, channels=2), data[900:])
    assert torch.equal(read_audio(file, 7, 9, mono=True), data[7:16].mean(1))
    with pytest.raises(AudioError, match=r"a\.wav: the file has 2 channels, expected 1; mono=True averages"):
        read_audio(file)
    one = write(tmp_path / "b.wav", data[:, 0], subtype="FLOAT")
    assert torch.equal(read_audio(one, mono=True), data[:, 0])
    with pytest.raises(AudioError, match=r"b\.wav: the file has 1 channel, expected 2$"):
        read_audio(one, channels=2)
    with pytest.raises(AudioError, match=r"frames 990 to 1001 reaches beyond the file, which holds 1000"):
        read_audio(one, 990, 11)
    with pytest.raises(AudioError, match="frames 1000 to the end reaches beyond"):
        read_audio(one, 1000)
    with pytest.raises(ValueError, match="start is -1"):
        read_audio(one, -1)
    with pytest.raises(ValueError, match="frames is 0"):
        read_audio(one, 0, 0)


@pytest.mark.parametrize(("source", "target"), [(16000, 8000), (44100, 16000), (8000, 11025), (8000, 48000)])
def test_a_resampled_window_is_that_of_the_whole(tmp_path: Path, source: int, target: int) -> None:
    from torchaudio.transforms import Resample

    data = noise(3001, 2)
    file = write(tmp_path / "a.wav", data, source, "FLOAT")
    want = Resample(source, target)(data.T).T
    whole = read_audio(file, sample_rate=target, resample=True, channels=2)
    assert whole.shape[0] == audio_info(file).frames_at(target) == -(-3001 * target // source)
    torch.testing.assert_close(whole, want, rtol=0, atol=2e-6)
    n = whole.shape[0]
    for start, frames in ((0, 1), (1, 17), (n // 3, 401), (n - 5, 5), (n - 1, 1)):
        part = read_audio(file, start, frames, sample_rate=target, resample=True, mono=True)
        torch.testing.assert_close(part, want[start : start + frames].mean(1), rtol=0, atol=2e-6)


def test_resampling_reads_the_neighbourhood_alone_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchaudio.transforms import Resample

    from ssm_modal.io import resampling

    signal = noise(100_000, 1)
    asked: list[tuple[int, int]] = []

    def read(first: int, last: int) -> torch.Tensor:
        asked.append((first, last))
        assert 0 <= first < last <= signal.shape[0]
        return signal[first:last]

    read_resampled(read, 100_000, 16000, 8000, 20_000, 20_010, channels=1)
    ((first, last),) = asked
    assert 39_900 < first < 40_000
    assert 40_020 < last < 40_100
    monkeypatch.setattr(resampling, "_PIECE", 1009)
    out = read_resampled(read, 100_000, 16000, 12000, 0, 75_000, channels=1)
    torch.testing.assert_close(out, Resample(16000, 12000)(signal.T).T, rtol=0, atol=2e-6)
    # Exact where a float32 would round.
    assert resampled_frames(44_100_441, 44_100, 16_000) == 16_000_160
    with pytest.raises(ValueError, match="from 48000 to 44101 Hz would need a filter of"):
        read_resampled(read, 100_000, 48000, 44101, 0, 10, channels=1)


def test_another_rate_is_an_error_unless_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.wav", noise(100), 8000)
    with pytest.raises(AudioError, match=r"the sample rate is 8000 Hz, expected 16000 Hz; resample=True"):
        read_audio(file, sample_rate=16000)
    assert read_audio(file, sample_rate=16000, resample=True).shape == (200,)
    assert read_audio(file, sample_rate=8000, resample=True).shape == (100,)
    with pytest.raises(ValueError, match="expected a sample_rate to resample to"):
        read_audio(file, resample=True)
    with pytest.raises(ValueError, match="sample_rate is 0"):
        read_audio(file, sample_rate=0)


def bad_files(folder: Path) -> dict[str, str]:
    """Bad files by name, each with what the error says."""
    (folder / "zero.wav").write_bytes(b"")
    (folder / "text.wav").write_bytes(b"no audio at all, only words " * 9)
    write(folder / "nothing.wav", torch.zeros(0))
    good = write(folder / "good.wav", noise(1000), subtype="PCM_16").read_bytes()
    (folder / "short.wav").write_bytes(good[: len(good) - 600])
    (folder / "short.flac").write_bytes(write(folder / "good.flac", noise(20_000)).read_bytes()[:-9000])
    # Cut at a page: what is left decodes without an error.
    ogg = write(folder / "good.ogg", noise(40_000)).read_bytes()
    (folder / "short.ogg").write_bytes(ogg[: ogg.rindex(b"OggS")])
    nan = noise(50)
    nan[17] = float("nan")
    write(folder / "nan.wav", nan, subtype="FLOAT")
    infinite = noise(50, 2)
    infinite[3, 1] = float("-inf")
    write(folder / "infinite.wav", infinite, subtype="FLOAT")
    write(folder / "silent.wav", torch.zeros(64))
    return {
        "zero.wav": r"the file is empty \(0 bytes\)",
        "text.wav": r"cannot be read as audio \(.*\), expected WAV, FLAC, OGG or MP3",
        "nothing.wav": "the file holds 0 frames",
        "short.wav": "the file is cut short: it holds 1400 of 2000 bytes",
        "short.flac": "corrupt: ",
        "short.ogg": "the file is cut short: its last page is not marked as the end",
        "nan.wav": r"frame 17 is nan \(1 such samples in frames 0 to 50\), expected finite numbers",
        "infinite.wav": "frame 3 is -inf in channel 1",
        "silent.wav": "all samples of frames 0 to 64 are 0",
    }


@pytest.mark.skipif("MP3" not in sf.available_formats(), reason="this libsndfile writes no mp3")
def test_an_mp3_that_is_cut_short_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp3", 0.3 * torch.sin(torch.arange(80_000) * 0.05), 16000).read_bytes()
    for share, problem in ((0.6, "corrupt: the samples end at frame"), (0.05, "cannot be read as audio")):
        (tmp_path / "short.mp3").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(AudioError, match=rf"short\.mp3: {problem}") as caught:
            check_audio(tmp_path / "short.mp3")
        assert "does not exist" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    for name, problem in bad_files(tmp_path).items():
        for function in (read_audio, check_audio):
            with pytest.raises(AudioError, match=rf"{name}: {problem}") as caught:
                function(tmp_path / name, channels=None, refuse_silent=True)
            assert caught.value.path == tmp_path / name
            again = pickle.loads(pickle.dumps(caught.value))
            assert str(again) == str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.wav': there is no such audio file"):
        read_audio(tmp_path / "gone.wav")
    # Silence is refused only where that is asked for, the bad sample only where it is read.
    assert read_audio(tmp_path / "silent.wav").tolist() == [0.0] * 64
    assert read_audio(tmp_path / "nan.wav", 18).shape == (32,)
    assert check_audio(tmp_path / "nan.wav", decode=False).frames == 50
    assert check_audio(tmp_path / "nan.wav", 18).frames == 50
    with pytest.raises(AudioError, match="frame 17 is nan"):
        check_audio(tmp_path / "nan.wav", 34, 1, sample_rate=16000, resample=True)


def test_wav_files_of_unknown_size_are_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", noise(100), subtype="PCM_16").read_bytes()
    at = good.index(b"data") + 4
    piped = tmp_path / "piped.wav"
    piped.write_bytes(
        good[:4] + struct.pack("<I", 0xFFFFFFFF) + good[8:at] + b"\xff\xff\xff\xff" + good[at + 4 :]
    )
    assert torch.equal(read_audio(piped), read_audio(tmp_path / "good.wav"))


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_16", 15), ("PCM_24", 23), ("FLOAT", None)])
def test_what_is_written_is_read(tmp_path: Path, subtype: str, bits: int | None) -> None:
    wave = noise(500, 2)
    file = write_wav(tmp_path / "deep" / "a.wav", wave, 16000, subtype)  # type: ignore[arg-type]
    info = audio_info(file)
    assert (info.sample_rate, info.frames, info.channels, info.subtype) == (16000, 500, 2, subtype)
    read = read_audio(file, channels=2)
    if bits is None:
        assert torch.equal(read, wave)
    else:
        assert torch.equal(read, ((wave.double() * 2**bits).round() / 2**bits).float())
    # Once rounded, nothing changes any more; beyond full scale is clipped.
    assert torch.equal(read_audio(write_wav(tmp_path / "b.wav", read, 16000, subtype), channels=2), read)  # type: ignore[arg-type]
    if bits is not None:
        loud = read_audio(write_wav(tmp_path / "c.wav", torch.tensor([2.0, -2.0]), 8000, subtype))  # type: ignore[arg-type]
        assert loud.tolist() == [1 - 2.0**-bits, -1.0]


def test_a_wav_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_wav(tmp_path / "a.wav", torch.tensor([0.5, -0.5]), 8000)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for bad, error, word in (
        (torch.tensor([1, 2]), TypeError, "waveform is torch.int64"),
        (torch.zeros(0), ValueError, r"waveform has the shape \(0,\)"),
        (torch.zeros(1, 2, 3), ValueError, r"waveform has the shape \(1, 2, 3\)"),
        (torch.tensor([float("nan")]), ValueError, "holds NaN or infinite samples"),
    ):
        with pytest.raises(error, match=word):
            write_wav(file, bad, 8000)
    with pytest.raises(ValueError, match="sample_rate is 0"):
        write_wav(file, torch.zeros(3), 0)
    with pytest.raises(ValueError, match="subtype is 'PCM_8'"):
        write_wav(file, torch.zeros(3), 8000, "PCM_8")  # type: ignore[arg-type]
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_wav(file, torch.zeros(3), 8000)
    assert read_audio(file).tolist() == [0.5, -0.5]
    assert os.listdir(tmp_path) == ["a.wav"]


def test_the_readers_are_imported_without_the_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('soundfile', 'torchaudio', 'lightning'):\n"
        "    sys.modules[name] = None\n"
        "import ssm_modal.io, ssm_modal.tokenizers, torch\n"
        "print(ssm_modal.tokenizers.MuLawTokenizer().encode(torch.tensor([0.5])).item())\n"
        "try:\n"
        "    ssm_modal.io.read_audio('a.wav')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "239\naudio files need soundfile: pip install 'ssm-modal[audio]'\n"

"""Scoring generated recordings: distances and shares by hand, and the command end to end on tiny files."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")

import ssm_modal
from benchmarks.generated_audio import FRAMES, closeness_threshold, main, nearest, shape_of
from ssm_modal.io.wav import write_wav


def tone(frequency: float, seconds: float, phase: float = 0.0) -> torch.Tensor:
    t = torch.arange(round(8000 * seconds)) / 8000
    return 0.5 * torch.sin(2 * math.pi * frequency * t + phase)


def test_distances_are_root_mean_squares_whatever_the_length() -> None:
    shapes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    distance, at = nearest(torch.tensor([[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 2.0]]), shapes)
    assert distance.tolist() == pytest.approx([1.0, 0.5])
    assert at.tolist() == [0, 1]
    assert shape_of(tone(500, 0.3), 8000).shape == (40 * FRAMES,)
    short, long, other = (
        shape_of(tone(500, 0.3), 8000),
        shape_of(tone(500, 0.6), 8000),
        shape_of(tone(2000, 0.3), 8000),
    )
    near, _ = nearest(long[None], short[None])
    far, _ = nearest(other[None], short[None])
    assert float(nearest(short[None], short[None])[0]) == 0
    assert float(near) < 0.4 * float(far)


def test_the_threshold_is_that_of_the_closest_part() -> None:
    distances = torch.arange(300.0).flip(0) + 1
    assert closeness_threshold(distances) == 3.0
    assert closeness_threshold(distances[:50]) == 251.0
    assert closeness_threshold(distances, 0.5) == 150.0


def test_the_command_counts_copies_and_recognised_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two digits, each a tone; of four generated recordings one copies a training file to the bit."""
    real, generator = tmp_path / "real", torch.Generator().manual_seed(0)

    def noisy(digit: int, seconds: float = 0.2) -> torch.Tensor:
        wave = tone(600 + 900 * digit, seconds)
        return wave + 0.05 * torch.randn(wave.shape, generator=generator)

    for digit in (0, 1):
        for index in (0, 1, 2, 10, 11, 12):
            write_wav(real / f"{digit}_ann_{index}.wav", noisy(digit), 8000)
    made = tmp_path / "made"
    copy = (real / "0_ann_11.wav").read_bytes()
    rows = [["0/0_0000.wav", "0"], ["0/0_0001.wav", "0"], ["1/1_0000.wav", "1"], ["1/1_0001.wav", "1"]]
    for (path, _), wave in zip(rows, (None, noisy(1, 0.25), noisy(1, 0.3), noisy(1, 0.1))):
        if wave is None:
            (made / path).parent.mkdir(parents=True)
            (made / path).write_bytes(copy)
        else:
            write_wav(made / path, wave, 8000)
    with (made / "generated.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "label", "seed", "samples", "finish"))
        table.writerows([*row, i, 1600, "end"] for i, row in enumerate(rows))

    classifier: Any = ssm_modal.create_model("audio_classifier", n_classes=2, d_model=8, n_layers=1)
    classifier.save_pretrained(tmp_path / "classifier")

    # The tone that is heard decides, in the place of a trained classifier.
    def heard(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        loudest = float(torch.fft.rfft(x[0]).abs().argmax()) * 8000 / x.shape[1]
        return torch.tensor([[1.0, -1.0]]) * (1 if loudest < 1000 else -1), None

    monkeypatch.setattr("ssm_modal.models.SequenceClassifier.forward", heard)
    arguments = ["--generated", str(made), "--classifier", str(tmp_path / "classifier"), "--path", str(real)]
    assert main([*arguments, "--out", str(tmp_path / "scores")]) == 0
    with (tmp_path / "scores" / "figures.csv").open(newline="") as file:
        figures = {name: float(value) for name, value in list(csv.reader(file))[1:]}
    assert figures["generated"] == 4
    assert figures["recognised"] == 0.75
    assert (figures["recognised_0"], figures["recognised_1"]) == (0.5, 1.0)
    assert figures["recognised_of_real_test"] == 1.0
    assert figures["too_close"] == 0.25
    with (tmp_path / "scores" / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert [s["predicted"] for s in scores] == ["0", "1", "1", "1"]
    assert float(scores[0]["distance"]) == 0.0 < figures["threshold"] < float(scores[1]["distance"])
    assert scores[0]["nearest"].endswith("0_ann_11.wav")
    picture = (tmp_path / "scores" / "examples.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert "recognised                      0.75" in capsys.readouterr().out

    # Of another rate or other classes the classifier says nothing; nothing is written.
    kept = {"AudioDataModule": {"classes": ["0", "1"], "sample_rate": 16000}}
    monkeypatch.setattr("benchmarks.generated_audio.stored_data", lambda place: kept["AudioDataModule"])
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 1
    told = "error: --classifier was trained with sample_rate 16000, but the recordings have 8000"
    assert told in capsys.readouterr().err
    assert main(["--generated", str(real), *arguments[2:], "--out", str(tmp_path / "other")]) == 1
    assert "generated.csv" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()

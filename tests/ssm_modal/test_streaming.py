"""Streams of audio: every registered causal classifier by chunks of any size, the command, the benchmark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from benchmarks import streaming
from ssm_modal.cli.main import main
from ssm_modal.errors import StateError
from ssm_modal.generation import StreamingClassifier
from ssm_modal.layers import FilterbankConfig, StridedWaveformConfig, WaveformConfig
from ssm_modal.models import SequenceClassifier, SequenceClassifierConfig, list_models, model_config


def audio_models() -> list[str]:
    """The registered classifiers of waveforms that are causal, and the others in their causal form."""
    kinds = (WaveformConfig, StridedWaveformConfig, FilterbankConfig)
    names = []
    for name in list_models():
        config = model_config(name)
        if isinstance(config, SequenceClassifierConfig) and isinstance(config.input, kinds):
            names.append(name)
    return names


def causal(name: str) -> SequenceClassifier:
    torch.manual_seed(1)
    config = model_config(name)
    assert isinstance(config, SequenceClassifierConfig)
    whole = config.input.needs_whole
    options = {} if whole is None else {whole: "none"}
    model = ssm_modal.create_model(name, **options, bidirectional=None, d_model=8, n_layers=2, d_state=4)
    assert isinstance(model, SequenceClassifier)
    return model.double()


@pytest.mark.parametrize("name", audio_models())
@pytest.mark.parametrize("size", [1, 7, 160, 4096])
def test_chunks_of_any_size_give_the_probabilities_of_the_whole(name: str, size: int) -> None:
    model = causal(name)
    # Single samples of a short stream; else longer than a chunk, and no multiple of it or of a stride.
    wave = 0.2 * torch.randn(2, {1: 331, 7: 503, 160: 1703, 4096: 9001}[size], dtype=torch.float64)
    stream = StreamingClassifier(model, rows=2)
    probabilities = torch.zeros(())
    for chunk in wave.split(size, 1):
        probabilities = stream.feed(chunk)
    with torch.no_grad():
        whole = model(wave)[0].softmax(-1)
    torch.testing.assert_close(probabilities, whole, rtol=1e-9, atol=1e-11)
    assert (probabilities.sum(-1) - 1).abs().max() < 1e-12
    stream.reset()
    torch.testing.assert_close(stream.feed(wave), whole, rtol=1e-9, atol=1e-11)


def test_a_model_that_needs_the_whole_is_refused() -> None:
    model = ssm_modal.create_model("audio_classifier", d_model=8, n_layers=1)
    assert isinstance(model, SequenceClassifier)
    with pytest.raises(StateError, match="needs the whole sequence, expected a causal classifier"):
        StreamingClassifier(model)


def test_the_command_ends_with_the_decision_of_the_whole(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("soundfile")
    from ssm_modal.io.audio import read_audio
    from ssm_modal.io.wav import write_wav

    model = causal("audio_classifier_causal").float().eval()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "a.wav"
    write_wav(file, 0.2 * torch.randn(1000), 8000)
    command = ["stream", "--model", str(tmp_path / "model"), str(file), "--chunk-ms", "20"]
    assert main(command) == 1
    assert "give it by --sample-rate" in capsys.readouterr().err
    assert main([*command, "--sample-rate", "8000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 7 + 1  # a heading, 6 chunks of 160 samples and one of 40, a summary
    seconds, name, probability, latency = lines[-2].split()
    with torch.no_grad():
        whole = model(read_audio(file)[None])[0][0].softmax(-1)
    assert int(name) == int(whole.argmax())
    assert float(probability) == pytest.approx(float(whole.max()), abs=1e-4)
    assert float(seconds) == 0.125
    assert float(latency) > 0
    found = re.match(
        r"7 chunks of 20 ms: latency median [\d.]+ ms, .* real-time factor ([\d.]+) on cpu", lines[-1]
    )
    assert found is not None, lines[-1]
    assert float(found[1]) > 0
    for option, message in (
        (["--chunk-ms", "0"], "--chunk-ms is 0.0, expected more than 0"),
        (["--threads", "0"], "--threads is 0, expected 1 or more"),
    ):
        assert main([*command, "--sample-rate", "8000", *option]) == 1
        assert message in capsys.readouterr().err
    assert main([*command, "--sample-rate", "16000"]) == 1
    told = capsys.readouterr()
    assert f"{file}: the sample rate is 8000 Hz, expected 16000 Hz" in told.err
    assert told.out == ""  # not even the heading


def test_the_benchmark_checks_then_times(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    try:
        assert streaming.main(["--seconds", "0.5", "--chunk-ms", "50", "100"], said.append) == 0
        assert said[0].startswith("check: ok")
        for line, ms in zip(said[3:], (50, 100), strict=True):
            size, median, late, factor, work = (float(cell) for cell in line.split())
            assert size == ms
            assert 0 < median <= late
            assert factor > 0.5 * median / ms
            assert work >= 0
        monkeypatch.setattr(streaming, "difference", lambda *args: 1.0)
        said.clear()
        assert streaming.main(["--seconds", "0.5"], said.append) == 1
        assert len(said) == 1
    finally:
        torch.set_num_threads(threads)

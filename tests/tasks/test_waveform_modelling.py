"""Waveforms as ids in the language-modelling task: bits a sample by hand, by class, by segments, as heard."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
pytest.importorskip("soundfile")

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

import ssm_modal
from ssm_modal.cli.callbacks import LogAudio
from ssm_modal.cli.language_model import find_tokenizer
from ssm_modal.datamodules.audio import AudioDataModule
from ssm_modal.generation import GenerationConfig, generate_waveforms
from ssm_modal.io.log_mel import log_mel
from ssm_modal.io.wav import write_wav
from ssm_modal.tasks import LanguageModelling
from ssm_modal.tasks.optimizers import OptimizerConfig
from ssm_modal.tokenizers import MuLawTokenizer, load_tokenizer
from tests.tasks.tiny import TinyData

SMALL: dict[str, Any] = {"d_model": 8, "n_layers": 1, "vocab_size": 260}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    for label in ("no", "yes"):
        for i in range(10):
            wave = 0.3 * torch.randn(20 + 3 * i, generator=generator)
            write_wav(tmp_path / "data" / label / f"{label}_{i}.wav", wave, 8000)
    return tmp_path / "data"


def data(folder: Path, **options: Any) -> AudioDataModule:
    settings: dict[str, Any] = {"sample_rate": 8000, "batch_samples": 100, "seed": 1, "val_fraction": 0.2}
    ids = {"layout": "windows", "input": "mu_law", "condition": "label"}
    return AudioDataModule(str(folder), **{**settings, **ids, **options})


def trainer(root: Path, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "logger": False, **quiet, **settings, **options}
    return pl.Trainer(default_root_dir=root, num_sanity_val_steps=0, **settings)


def test_every_recording_begins_with_its_class_and_ends_with_the_end(folder: Path) -> None:
    module = data(folder)
    assert module.vocab_size == 260
    batches = module.batches("train")
    for i in range(batches.n_batches):
        batch = batches.make_evaluation(i, 0, 1)
        borders = batch["cu_seqlens"].tolist()
        for n, (a, b) in enumerate(itertools.pairwise(borders)):
            assert batch["ids"][0, a] == 258 + batch["classes"][n]
            assert batch["labels"][0, b - 1] == 257
            assert (batch["labels"][0, a : b - 1] < 256).all()
    saved = module.state_dict()
    assert json.loads(saved["tokenizer"])["classes"] == ["no", "yes"]
    module.load_state_dict(saved)
    with pytest.raises(ValueError, match="the checkpoint was trained with tokenizer"):
        data(folder, condition="none").load_state_dict(saved)


def test_conditions_that_do_not_fit_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match='condition is "label" with source "unlabelled"'):
        data(folder, source="unlabelled")
    with pytest.raises(ValueError, match="condition is 'label' with layout \"recordings\""):
        AudioDataModule(str(folder), condition="label")
    with pytest.raises(ValueError, match="condition is 'speaker', expected one of none, label"):
        data(folder, condition="speaker")


def test_bits_a_sample_by_hand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is given the probability 1/8, every end 1/2: 3 bits a sample, 1 an end."""
    task = LanguageModelling("wavenet_lm", SMALL)

    def target_nats(batch: dict[str, Tensor]) -> Tensor:
        return torch.where(batch["labels"] == 257, math.log(2), 3 * math.log(2))

    monkeypatch.setattr(task, "_target_nats", target_nats)
    module = data(folder)
    (found,) = trainer(tmp_path).test(task, module, verbose=False)
    samples = sum(clip.frames for clip in module.clips("test"))
    assert samples > 40
    assert found["test/bits_per_sample"] == pytest.approx(3)
    assert found["test/bits_per_end"] == pytest.approx(1)
    assert found["test/bits_per_sample_with_end"] == pytest.approx((3 * samples + 2) / samples)
    assert found["test/loss"] == pytest.approx(math.log(2) * (3 * samples + 2) / (samples + 2))


@pytest.mark.parametrize("name", ["sashimi_lm", "wavenet_lm"])
def test_bits_a_sample_of_a_model_and_by_segments(name: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = LanguageModelling(name, SMALL)
    module = data(folder)
    (whole,) = trainer(tmp_path).test(task, module, verbose=False)
    bits, samples = 0.0, 0
    with torch.no_grad():
        for clip in module.clips("test"):
            ids = module.tokenizer.encode_recording(clip.read(), clip.recording.label)
            logs = task.model.eval()(ids[None, :-1])[0][0].log_softmax(-1)
            bits -= float(logs[torch.arange(clip.frames), ids[1:-1]].sum()) / math.log(2)
            samples += clip.frames
    assert whole["test/bits_per_sample"] == pytest.approx(bits / samples, rel=1e-5)
    task.segment = 7
    (parts,) = trainer(tmp_path).test(task, module, verbose=False)
    assert parts["test/bits_per_sample"] == pytest.approx(whole["test/bits_per_sample"], rel=1e-5)
    assert parts["test/bits_per_end"] == pytest.approx(whole["test/bits_per_end"], rel=1e-5)


def test_a_run_learns_and_can_be_generated_from(folder: Path, tmp_path: Path) -> None:
    """A constant recording for each class: what follows its begin id is learned, by the U-Net and WaveNet;
    the checkpoint alone tells how to generate."""
    for i in range(10):
        for label, level in (("no", -0.5), ("yes", 0.5)):
            write_wav(folder / label / f"{label}_{i}.wav", torch.full((12,), level), 8000)
    for name in ("sashimi_lm", "wavenet_lm"):
        run = tmp_path / name
        torch.manual_seed(0)
        task = LanguageModelling(
            name, {**SMALL, "d_model": 16, "n_layers": 2}, OptimizerConfig(lr=0.03, weight_decay=0.0)
        )
        fit = trainer(run, max_steps=30, val_check_interval=30, enable_checkpointing=False)
        fit.fit(task, data(folder))
        fit.save_checkpoint(run / "last.ckpt")
        (found,) = fit.test(task, data(folder), verbose=False)
        assert found["test/bits_per_sample"] < 0.5, (name, found)
        assert load_tokenizer(run).to_config() == data(folder).tokenizer.to_config()
        (run / "tokenizer.json").unlink()
        tokenizer = find_tokenizer(str(run / "last.ckpt"))
        assert isinstance(tokenizer, MuLawTokenizer)
        assert (tokenizer.classes, tokenizer.sample_rate) == (("no", "yes"), 8000)
        config = GenerationConfig(max_new_tokens=20, temperature=0)
        model: Any = ssm_modal.load_pretrained(run / "last.ckpt")
        made = generate_waveforms(model, tokenizer, ["no", "yes"], config)
        for one, level in zip(made, (-0.5, 0.5)):
            torch.testing.assert_close(one.waveform[:12], torch.full((12,), level), atol=0.02, rtol=0)


def test_tensorboard_hears_the_model(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.manual_seed(0)
    task, board = LanguageModelling("wavenet_lm", SMALL), TensorBoardLogger(tmp_path, name="tb")
    callback = LogAudio(every_n_validations=2, seconds=0.004, labels=["yes"])
    fit = trainer(tmp_path, max_steps=8, callbacks=[callback], logger=board)
    fit.fit(task, data(folder))
    events = EventAccumulator(board.log_dir, size_guidance={"audio": 0, "images": 0}).Reload()
    assert sorted(events.Tags()["audio"]) == ["generated/yes", "real/yes"]
    assert [one.step for one in events.Audio("generated/yes")] == [4, 8]
    assert [one.step for one in events.Audio("real/yes")] == [4]
    (real,) = events.Audio("real/yes")
    clip = next(c for c in data(folder).clips("validation") if c.recording.label == "yes")
    assert (real.sample_rate, real.length_frames) == (8000, clip.frames)
    picture = events.Images("real/yes/log_mel")[0]
    assert (picture.height, picture.width) == (40, clip.frames // 80 + 1)
    assert callback.state_dict() == {"validations": 4}
    with pytest.raises(ValueError, match="every_n_validations is 0"):
        LogAudio(every_n_validations=0)
    with pytest.raises(ValueError, match="no tokenizer of waveforms"):
        trainer(tmp_path, callbacks=[LogAudio()]).fit(LanguageModelling("wavenet_lm", SMALL), TinyData())


def test_log_mel_finds_a_tone_and_its_power() -> None:
    t = torch.arange(8000) / 8000
    picture = log_mel(torch.sin(2 * math.pi * 1000 * t), 8000)
    assert picture.shape == (40, 101)
    # HTK's scale: 2595 log10(1 + f / 700); bands are spaced evenly on it from 0 to 4 kHz.
    mel = lambda f: 2595 * math.log10(1 + f / 700)  # noqa: E731
    assert abs(int(picture[:, 50].argmax()) + 1 - mel(1000) / mel(4000) * 41) < 1
    assert float(log_mel(torch.zeros(1), 8000).max()) == pytest.approx(math.log(1e-6))
    halved = log_mel(torch.sin(2 * math.pi * 1000 * t) / 2, 8000)
    assert float(picture[:, 50].max() - halved[:, 50].max()) == pytest.approx(math.log(4), abs=0.01)
    with pytest.raises(ValueError, match=r"waveform is \(0,\)"):
        log_mel(torch.zeros(0), 8000)

"""The audio data module: recordings packed whole, windows that predict every id once, order and resume."""

from __future__ import annotations

import csv
import itertools
import math
import os
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("soundfile")

import lightning.pytorch as pl

from ssm_modal.datamodules.audio import AudioDataModule
from ssm_modal.datamodules.audio_augment import Augmentation
from ssm_modal.datamodules.batch_plan import BatchPlan, cut
from ssm_modal.datamodules.resumable import derived_generator
from ssm_modal.io.audio import AudioError, read_audio
from ssm_modal.io.manifests import ManifestError
from ssm_modal.io.wav import write_wav
from ssm_modal.tokenizers.waveform import MuLawTokenizer

LENGTHS = [40, 55, 31, 70, 44, 62, 38, 90, 50, 33]


def recordings(folder: Path) -> Path:
    """Ten files of each of two labels, of unequal length; the same bytes in every test."""
    generator = torch.Generator().manual_seed(3)
    for label in ("no", "yes"):
        for i, n in enumerate(LENGTHS):
            wave = torch.rand(n, generator=generator) - 0.5
            write_wav(folder / label / f"{label}_{i}.wav", wave, 8000)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return recordings(tmp_path / "data")


def module(folder: Path, **options: Any) -> AudioDataModule:
    settings: dict[str, Any] = {"sample_rate": 8000, "batch_samples": 200, "seed": 1}
    return AudioDataModule(**{"path": str(folder), **settings, **options})


def split_packed(batch: dict[str, torch.Tensor], key: str) -> list[torch.Tensor]:
    borders = batch["cu_seqlens"].tolist()
    assert borders[0] == 0
    assert borders[-1] == batch[key].shape[1]
    return [batch[key][0, a:b] for a, b in itertools.pairwise(borders)]


def test_recordings_are_packed_whole(folder: Path) -> None:
    data = module(folder)
    assert data.classes == ("no", "yes")
    assert [len(data.clips(s)) for s in ("train", "validation", "test")] == [16, 2, 2]
    batches = data.batches("train")
    for index in range(12):
        batch = batches.make_training(index, 0, 1)
        assert set(batch) == {"waveform", "cu_seqlens", "labels", "recordings"}
        assert batch["waveform"].dtype == torch.float32
        assert batch["waveform"].shape[1] <= 200
        pieces = split_packed(batch, "waveform")
        assert len(pieces) == batch["labels"].shape[0] == batch["recordings"].shape[0]
        for piece, label, row in zip(pieces, batch["labels"].tolist(), batch["recordings"].tolist()):
            clip = data.clips("train")[row]
            assert torch.equal(piece, read_audio(clip.recording.path))
            assert data.classes[label] == clip.recording.path.parent.name


def test_ids_are_mu_law_of_the_same_samples(folder: Path) -> None:
    waves = module(folder).batches("train").make_training(3, 0, 1)
    ids = module(folder, input="mu_law").batches("train").make_training(3, 0, 1)
    assert torch.equal(ids["ids"], MuLawTokenizer().encode(waves["waveform"]))
    assert torch.equal(ids["cu_seqlens"], waves["cu_seqlens"])
    assert module(folder, input="mu_law").vocab_size == 258
    with pytest.raises(ValueError, match='input is "waveform", which has no vocabulary'):
        module(folder).vocab_size  # noqa: B018


def test_an_epoch_holds_every_recording_once_in_an_order_of_its_own(folder: Path) -> None:
    batches = module(folder).batches("train")
    rows = [batches.make_training(i, 0, 1)["recordings"].tolist() for i in range(60)]
    seen = list(itertools.chain.from_iterable(rows))
    epochs = [seen[i : i + 16] for i in range(0, len(seen) - 16, 16)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    # Greedy: the next recording would not have fit, unless the epoch was over.
    sizes = [clip.frames for clip in module(folder).clips("train")]
    taken = 0
    for row, after in itertools.pairwise(rows):
        taken += len(row)
        assert sum(sizes[i] for i in row) <= 200
        assert taken % 16 == 0 or sum(sizes[i] for i in row) + sizes[after[0]] > 200


def test_processes_share_the_batches_out(folder: Path) -> None:
    batches = module(folder).batches("train")
    alone = [batches.make_training(i, 0, 1)["recordings"].tolist() for i in range(20)]
    pairs = [batches.make_training(i, r, 2)["recordings"].tolist() for i in range(10) for r in range(2)]
    assert alone == pairs
    far = module(folder).batches("train").make_training(5000, 1, 2)
    assert torch.equal(far["waveform"], batches.make_training(10_001, 0, 1)["waveform"])


def test_a_recording_longer_than_the_budget_stands_alone(folder: Path) -> None:
    loader = module(folder, eval_batch_samples=1, val_fraction=0.5).val_dataloader()
    batches = list(loader)
    assert [b["labels"].shape[0] for b in batches] == [1] * 10
    assert [b["recordings"].tolist() for b in batches] == [[i] for i in range(10)]


def test_seed_workers_and_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = Augmentation(0.001, 6.0, (10.0, 20.0))

    def draw(seed: int | None, index: int = 4) -> torch.Tensor:
        return (
            module(folder, seed=seed, augment=augment).batches("train").make_training(index, 0, 1)["waveform"]
        )

    assert torch.equal(draw(1), draw(1))
    assert draw(1).shape != draw(2).shape or not torch.equal(draw(1), draw(2))
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert torch.equal(draw(None), draw(2))

    progress = SimpleNamespace(total=SimpleNamespace(processed=11))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data = module(folder, augment=augment)
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=1, world_size=2)  # type: ignore[assignment]
    expected = [data.batches("train").make_training(i, 1, 2) for i in (11, 12, 13)]
    for workers in (0, 2):
        data.num_workers = workers
        for want, got in zip(expected, data.train_dataloader()):
            assert torch.equal(want["waveform"], got["waveform"])
    again = pickle.loads(pickle.dumps(data.batches("train")))
    assert torch.equal(again.make_training(12, 1, 2)["waveform"], expected[1]["waveform"])


@pytest.mark.parametrize("window", [None, 16, 45])
def test_windows_predict_every_sample_and_the_end_once(folder: Path, window: int | None) -> None:
    data = module(folder, layout="windows", input="mu_law", window=window, val_fraction=0.4)
    tokenizer = MuLawTokenizer()
    batches = data.batches("validation")
    predicted: dict[int, list[tuple[int, int]]] = {}
    for batch in data.val_dataloader():
        assert set(batch) == {"ids", "labels", "cu_seqlens", "recordings", "classes", "starts"}
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64
        ids, labels = split_packed(batch, "ids"), split_packed(batch, "labels")
        for i, (row, start) in enumerate(zip(batch["recordings"].tolist(), batch["starts"].tolist())):
            assert len(predicted.setdefault(row, [])) == start
            assert len(ids[i]) <= (window or 91)
            predicted[row] += zip(ids[i].tolist(), labels[i].tolist())
            assert data.classes[batch["classes"][i]] == data.clips("validation")[row].recording.label
    assert len(predicted) == len(data.clips("validation")) == 8
    for row, pairs in predicted.items():
        stream = tokenizer.encode_recording(data.clips("validation")[row].read()).tolist()
        assert pairs == list(itertools.pairwise(stream))
    assert sum(len(p) for p in predicted.values()) == sum(c.frames + 1 for c in data.clips("validation"))
    assert batches.n_batches > 1


def test_training_windows_cover_an_epoch_and_move(folder: Path) -> None:
    data = module(folder, layout="windows", input="mu_law", window=16)
    batches = data.batches("train")
    streams = [MuLawTokenizer().encode_recording(c.read()) for c in data.clips("train")]
    total = sum(len(s) - 1 for s in streams)
    counts: Counter[tuple[int, int]] = Counter()
    starts = set()
    index = 0
    while sum(counts.values()) < 5 * total:
        batch = batches.make_training(index, 0, 1)
        index += 1
        ids, labels = split_packed(batch, "ids"), split_packed(batch, "labels")
        for i, (row, start) in enumerate(zip(batch["recordings"].tolist(), batch["starts"].tolist())):
            n = len(ids[i])
            assert torch.equal(ids[i], streams[row][start : start + n])
            assert torch.equal(labels[i], streams[row][start + 1 : start + n + 1])
            counts.update((row, start + k) for k in range(n))
            starts.add((row, start % 16))
    # Five epochs end where a batch ends: every place predicted five times.
    assert set(counts.values()) == {5}
    assert len(counts) == total
    assert len({s for _, s in starts}) == 16


def test_parts_cover_each_recording_end_to_end() -> None:
    lengths = torch.tensor([1, 15, 16, 17, 100])
    fixed = cut(lengths, 16)
    assert fixed.recording.tolist() == [0, 1, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4]
    assert fixed.first.tolist() == [0, 0, 0, 0, 16, 0, 16, 32, 48, 64, 80, 96]
    assert fixed.last.tolist() == [1, 15, 16, 16, 17, 16, 32, 48, 64, 80, 96, 100]
    for draw in range(20):
        moved = cut(lengths, 16, derived_generator("test", draw))
        assert (moved.sizes >= 1).all()
        assert (moved.sizes <= 16).all()
        for row, n in enumerate(lengths.tolist()):
            mine = moved[moved.recording == row]
            assert mine.first.tolist() == [0, *mine.last.tolist()[:-1]]
            assert mine.last.tolist()[-1] == n
    with_budget = BatchPlan(torch.tensor([5, 5, 11, 1, 9, 1]), 10)
    assert [p.recording.tolist() for p in with_budget.evaluation()] == [[0, 1], [2], [3, 4], [5]]


def test_rooms_add_a_decaying_tail_to_half_of_the_recordings() -> None:
    """The impulse stays as it is; what follows has the energy and the decay that were drawn."""
    pytest.importorskip("torchaudio")
    impulse = torch.zeros(8000)
    impulse[1000] = 0.5
    outs = [Augmentation(reverb_seconds=0.4)(impulse, 8000, derived_generator("room", i)) for i in range(200)]
    assert all(out.shape == (8000,) for out in outs)
    heard = [out for out in outs if not torch.equal(out, impulse)]
    assert 70 < len(heard) < 130
    levels, ends = [], []
    for out in heard:
        assert out[:1000].abs().max() < 1e-5
        assert float(out[1000]) == pytest.approx(0.5, abs=1e-4)
        tail = out[1001:]
        levels.append(-10 * math.log10(float(tail.square().sum()) / 0.25))
        ends.append(int((tail.abs() > 5e-6).nonzero().max()) + 1)
        if ends[-1] > 1000:  # half as long, 30 dB
            half = ends[-1] // 2
            early, late = tail[: ends[-1] // 5], tail[half : half + ends[-1] // 5]
            assert 10 * math.log10(float(early.square().sum() / late.square().sum())) == pytest.approx(
                30, abs=4
            )
    assert -0.01 < min(levels) < 2
    assert 18 < max(levels) < 20.01
    assert 2800 < max(ends) <= 3200


def test_half_of_the_recordings_are_padded_with_silence() -> None:
    pytest.importorskip("torchaudio")
    wave = torch.rand(500) + 0.1
    padded = []
    for i in range(100):
        out = Augmentation(pad_seconds=0.01)(wave * 0.5, 8000, derived_generator("pad", i))
        before = int((out > 0).int().argmax())
        assert torch.equal(out[before : before + 500], wave * 0.5)
        after = len(out) - before - 500
        assert int((out > 0).sum()) == 500
        padded += [(before, after)] if len(out) > 500 else []
    assert 30 < len(padded) < 70
    for side in zip(*padded):
        assert min(side) < 10
        assert 70 < max(side) <= 80


def test_noise_falls_by_its_slope() -> None:
    pytest.importorskip("torchaudio")
    wave = 0.05 * torch.sin(torch.arange(1 << 15))
    for slope in (0.0, 3.0, 6.0):
        augment = Augmentation(noise_snr_db=(10.0, 10.0), noise_slope_db=(slope, slope))
        noise = augment(wave, 8000, derived_generator("slope")) - wave
        assert 10 * math.log10(float(wave.square().sum() / noise.square().sum())) == pytest.approx(
            10, abs=0.1
        )
        power = torch.fft.rfft(noise).abs().square()
        octaves = [float(power[1 << k : 2 << k].mean()) for k in range(8, 14)]
        falls = [10 * math.log10(a / b) for a, b in itertools.pairwise(octaves)]
        assert sum(falls) / len(falls) == pytest.approx(slope, abs=0.25)


def test_augmentation_does_what_it_says() -> None:
    pytest.importorskip("torchaudio")
    wave = torch.rand(4000) * 0.2 + 0.1
    draws = [derived_generator("augment", i) for i in range(40)]
    shifted = [Augmentation(shift_seconds=0.01)(wave, 8000, g) for g in draws]
    found = set()
    for out in shifted:
        (by,) = [
            k
            for k in range(-80, 81)
            if torch.equal(out[max(k, 0) : 4000 + min(k, 0)], wave[max(-k, 0) : 4000 - max(k, 0)])
        ]
        found.add(by)
        assert (out == 0).sum() == abs(by)
    assert min(found) < -40
    assert max(found) > 40
    ratios = [
        (Augmentation(gain_db=6.0)(wave, 8000, derived_generator("gain", i)) / wave).mean().log10().item()
        * 20
        for i in range(40)
    ]
    assert -6.0 <= min(ratios) < -4.0
    assert 4.0 < max(ratios) <= 6.0
    for i in range(10):
        noisy = Augmentation(noise_snr_db=(12.0, 15.0))(wave, 8000, derived_generator("noise", i))
        snr = 10 * (wave.square().sum() / (noisy - wave).square().sum()).log10()
        assert 11.99 < snr < 15.01
    loud = [
        Augmentation(gain_db=40.0)(torch.full((50,), 0.9), 8000, derived_generator("loud", i)).max().item()
        for i in range(20)
    ]
    assert max(loud) == 1.0
    assert torch.equal(Augmentation()(wave, 8000, draws[0]), wave)
    # Shorter than the shift: something of it is always left.
    assert Augmentation(shift_seconds=9.0)(wave[:3], 8000, draws[1]).abs().sum() > 0
    for options, word in (
        ({"gain_db": -1.0}, "gain_db is -1.0"),
        ({"shift_seconds": float("nan")}, "shift_seconds is nan"),
        ({"noise_snr_db": (20.0, 10.0)}, "noise_snr_db is"),
        ({"speed": (1.2, 0.8)}, "speed is"),
        ({"speed": (0.0, 1.0)}, "speed is"),
        ({"equalize_db": -2.0}, "equalize_db is -2.0"),
        ({"mask_seconds": float("inf")}, "mask_seconds is inf"),
        ({"reverb_seconds": -0.1}, "reverb_seconds is -0.1"),
        ({"pad_seconds": -1.0}, "pad_seconds is -1.0"),
        ({"noise_snr_db": (10.0, 20.0), "noise_slope_db": (3.0, 0.0)}, "noise_slope_db is"),
        ({"noise_slope_db": (0.0, 3.0)}, "noise_slope_db is .* without noise_snr_db"),
    ):
        with pytest.raises(ValueError, match=word):
            Augmentation(**options)  # type: ignore[arg-type]


def test_speed_moves_duration_and_pitch_together() -> None:
    pytest.importorskip("torchaudio")
    tone = 0.5 * torch.sin(2 * torch.pi * 500 * torch.arange(8000) / 8000)
    found = []
    for i in range(30):
        out = Augmentation(speed=(0.8, 1.25))(tone, 8000, derived_generator("speed", i))
        factor = 8000 / out.shape[0]
        assert 0.8 - 0.01 <= factor <= 1.25 + 0.01
        spectrum = torch.fft.rfft(out * torch.hann_window(out.shape[0])).abs()
        pitch = int(spectrum.argmax()) * 8000 / out.shape[0]
        assert pitch == pytest.approx(500 * factor, abs=1.5)
        found.append(round(factor, 2))
    assert min(found) < 0.86
    assert max(found) > 1.18
    assert torch.equal(Augmentation(speed=(1.0, 1.0))(tone, 8000, derived_generator("same")), tone)


def test_equalizing_tilts_the_spectrum_and_masking_silences_a_stretch() -> None:
    pytest.importorskip("torchaudio")
    impulse = torch.zeros(4096)
    impulse[100] = 0.1
    ranges = []
    for i in range(20):
        out = Augmentation(equalize_db=6.0)(impulse, 8000, derived_generator("bands", i))
        level = 20 * (torch.fft.rfft(out).abs() / 0.1).log10()
        assert level.abs().max() < 12.1  # two bands of 6 dB at most
        ranges.append(float(level.max() - level.min()))
    assert max(ranges) > 4
    wave = torch.full((8000,), 0.5)
    lengths = []
    for i in range(30):
        out = Augmentation(mask_seconds=0.1)(wave, 8000, derived_generator("mask", i))
        (silent,) = (out == 0).nonzero(as_tuple=True)
        lengths.append(len(silent))
        assert torch.equal(silent, torch.arange(len(silent)) + (silent[0] if len(silent) else 0))
    assert max(lengths) <= 800
    assert max(lengths) > 600
    assert min(lengths) < 200


def test_packed_borders_follow_the_speed_and_every_second_sample(folder: Path) -> None:
    pytest.importorskip("torchaudio")
    data = module(folder, augment=Augmentation(speed=(0.5, 0.5)))
    batch = data.batches("train").make_training(0, 0, 1)
    pieces = split_packed(batch, "waveform")
    frames = [data.clips("train")[row].frames for row in batch["recordings"].tolist()]
    assert [piece.shape[0] for piece in pieces] == [2 * n for n in frames]
    half = module(folder, keep_every=2)
    assert half.sample_rate == 4000
    batch = half.batches("train").make_training(0, 0, 1)
    for piece, row in zip(split_packed(batch, "waveform"), batch["recordings"].tolist()):
        assert torch.equal(piece, half.clips("train")[row].read()[::2])
    assert 100 < batch["waveform"].shape[1] <= 200  # the budget counts what is kept


def test_only_training_is_augmented_and_every_epoch_anew(folder: Path) -> None:
    data = module(folder, augment=Augmentation(gain_db=6.0), val_fraction=0.4)
    for plain, got in zip(module(folder, val_fraction=0.4).val_dataloader(), data.val_dataloader()):
        assert torch.equal(plain["waveform"], got["waveform"])
    batches = data.batches("train")
    gains: dict[int, set[float]] = {}
    for index in range(40):
        batch = batches.make_training(index, 0, 1)
        for piece, row in zip(split_packed(batch, "waveform"), batch["recordings"].tolist()):
            gains.setdefault(row, set()).add(round((piece / batches.clips[row].read()).nanmedian().item(), 4))
    assert all(len(g) > 5 for g in gains.values())
    windows = module(folder, layout="windows", input="mu_law", window=16, augment=Augmentation(gain_db=6.0))
    assert windows.batches("train").make_training(0, 0, 1)["ids"].shape[0] == 1


def spoil(folder: Path) -> None:
    (folder / "yes" / "broken.wav").write_bytes(b"RIFF, but no more of it")
    nan = torch.tensor([0.5, float("nan")])
    import soundfile

    soundfile.write(folder / "no" / "nan.wav", nan.numpy(), 8000, subtype="FLOAT")
    write_wav(folder / "no" / "silent.wav", torch.zeros(20), 8000)
    write_wav(folder / "no" / "stereo.wav", torch.rand(20, 2), 8000)
    write_wav(folder / "yes" / "other_rate.wav", torch.rand(20), 16000)


def test_bad_files_end_the_run_or_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    with pytest.raises(AudioError, match=r"nan\.wav: frame 1 is nan"):
        module(folder).setup()
    data = module(folder, skip_bad=True)
    with pytest.warns(UserWarning, match="5 recordings were left out, the first: .*nan.wav"):
        data.setup()
    assert [(b.path.name, b.reason.split(",")[0]) for b in data.left_out] == [
        ("nan.wav", "frame 1 is nan (1 such samples in frames 0 to 2)"),
        ("silent.wav", "all samples of frames 0 to 20 are 0"),
        ("stereo.wav", "the file has 2 channels"),
        ("broken.wav", "cannot be read as audio (Format not recognised)"),
        ("other_rate.wav", "the sample rate is 16000 Hz"),
    ]
    assert sum(len(data.clips(s)) for s in ("train", "validation", "test")) == 20
    for batch in itertools.islice(data.train_dataloader(), 9):
        assert torch.isfinite(batch["waveform"]).all()
    # Asked for, the last two and silence are fine.
    fine = module(folder, skip_bad=True, mono=True, resample=True, refuse_silent=False)
    with pytest.warns(UserWarning, match="2 recordings were left out"):
        fine.setup()
    assert [b.path.name for b in fine.left_out] == ["nan.wav", "broken.wav"]
    with pytest.warns(UserWarning, match="left out"):
        trainer(tmp_path / "run", 1).fit(Recorder(), module(folder, skip_bad=True))
    with open(tmp_path / "run" / "left_out.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    assert [Path(row[0]).name for row in rows[1:]] == [b.path.name for b in data.left_out]


def test_splits_come_from_the_manifest(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    lines = [f"yes/yes_{i}.wav,a,{s}" for i, s in enumerate(("train", "train", "validation", "test"))]
    lines += ["no/no_7.wav,b,train"]
    manifest.write_text("\n".join(["path,label,split", *lines]) + "\n")
    data = module(manifest, source="manifest", root=str(folder))
    assert [c.recording.path.name for c in data.clips("train")] == ["yes_0.wav", "yes_1.wav", "no_7.wav"]
    assert [c.recording.path.name for c in data.clips("test")] == ["yes_3.wav"]
    (batch,) = list(data.test_dataloader())
    assert (batch["waveform"].shape, batch["labels"].tolist()) == ((1, 70), [0])
    manifest.write_text("path,label,split\nyes/yes_0.wav,a,train\nno/no_1.wav,b,test\n")
    lacking = module(manifest, source="manifest", root=str(folder))
    assert lacking.val_dataloader() == []
    with pytest.raises(
        ValueError, match=r"the train split of .* holds no recording of b, expected one or more"
    ):
        lacking.train_dataloader()
    with pytest.raises(ValueError, match=r"the validation split of .* holds no recording"):
        lacking.batches("validation")
    manifest.write_text("path,label\nyes/gone.wav,a\n")
    with pytest.raises(ManifestError, match=r"line 2: .*there is no such file"):
        module(manifest, source="manifest", root=str(folder)).setup()


def test_presets_are_found_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (0, 5, 10, 11):
        for digit in (1, 8):
            wave = torch.rand(30 + i)
            write_wav(tmp_path / "audio" / "fsdd" / "recordings" / f"{digit}_ann_{i}.wav", wave, 8000)
    monkeypatch.setenv("SSM_MODAL_DATA", str(tmp_path))
    data = AudioDataModule(source="free_spoken_digits", sample_rate=8000)
    assert data.classes == ("1", "8")
    assert [len(data.clips(s)) for s in ("train", "validation", "test")] == [4, 2, 2]
    held = AudioDataModule(source="free_spoken_digits", sample_rate=8000, left_out_speaker="ann")
    assert [len(held.clips(s)) for s in ("train", "validation", "test")] == [0, 0, 8]
    for i in range(3):
        write_wav(tmp_path / "audio" / "fsdd" / "recordings" / f"8_bob_{i}.wav", torch.rand(30), 8000)
    nested = AudioDataModule(
        source="free_spoken_digits",
        sample_rate=8000,
        left_out_speaker="ann",
        validation_speaker="bob",
    )
    assert [len(nested.clips(s)) for s in ("train", "validation", "test")] == [0, 3, 8]
    unlabelled = AudioDataModule(
        str(tmp_path), "unlabelled", sample_rate=16000, resample=True, layout="windows", input="mu_law"
    )
    assert unlabelled.classes == ()
    assert len(unlabelled.clips("train")) == 9
    assert set(unlabelled.batches("train").make_training(0, 0, 1)["classes"].tolist()) == {-100}
    monkeypatch.delenv("SSM_MODAL_DATA")
    with pytest.raises(ValueError, match="the environment variable SSM_MODAL_DATA is not set"):
        AudioDataModule(source="free_spoken_digits", sample_rate=8000).setup()


def test_all_recordings_are_predicted_in_the_order_of_their_names(folder: Path) -> None:
    names = [f"{label}_{i}.wav" for label in ("no", "yes") for i in range(10)]
    for options in ({}, {"source": "unlabelled"}):
        data = module(folder, predict="all", **options)
        assert [Path(file).name for file in data.predicted_files()] == names
        told = [int(n) for batch in data.predict_dataloader() for n in batch["recordings"]]
        assert told == list(range(20))
        assert data.example_input("predict", 13).shape == (1, LENGTHS[3])


def test_bad_arguments_are_named(folder: Path) -> None:
    for options, word in (
        ({"source": "tape"}, "source is 'tape'"),
        ({"layout": "rows"}, "layout is 'rows'"),
        ({"input": "ids"}, "input is 'ids'"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"batch_samples": 1.5}, r"batch_samples is 1\.5"),
        ({"eval_batch_samples": 0}, "eval_batch_samples is 0"),
        ({"window": 5}, 'window is 5 with layout "recordings"'),
        ({"layout": "windows"}, "input is 'waveform' with layout"),
        ({"source": "unlabelled"}, 'source is "unlabelled" with layout'),
        ({"pattern": "(a)"}, "pattern is given with source 'folder'"),
        ({"source": "pattern"}, 'pattern is None with source "pattern"'),
        ({"left_out_speaker": "ann"}, "left_out_speaker is given with source 'folder'"),
        ({"validation_speaker": "ann"}, "validation_speaker is given with source 'folder'"),
        ({"unknown": True}, "unknown is given"),
        ({"words": 10}, "words is given with source 'folder'"),
        ({"source": "manifest", "suffixes": [".aif"]}, "suffixes is given with source 'manifest'"),
        ({"root": "."}, "root is given"),
        ({"path": None}, "path is None with source 'folder'"),
        ({"num_workers": -1}, "num_workers is -1"),
        (
            {"layout": "windows", "input": "mu_law", "augment": Augmentation(speed=(0.9, 1.1))},
            "augment moves samples with layout",
        ),
        ({"layout": "windows", "input": "mu_law", "keep_every": 2}, "keep_every is 2 with layout"),
        ({"keep_every": 3}, "keep_every is 3, expected a divisor of sample_rate, 8000"),
        (
            {"layout": "windows", "input": "mu_law", "augment": Augmentation(shift_seconds=0.1)},
            "augment moves samples with layout",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            module(folder, **options)
    with pytest.raises(NotADirectoryError, match=r"no_0\.wav', a file, expected a folder with a folder"):
        module(folder / "no" / "no_0.wav").setup()
    with pytest.raises(ValueError, match="split is 'valid'"):
        module(folder).clips("valid")
    with pytest.raises(AudioError, match=r"\.wav: the sample rate is 8000 Hz, expected 16000 Hz"):
        module(folder, sample_rate=16000).setup()


class Recorder(pl.LightningModule):
    """Trains one number and keeps the samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(batch["waveform"].clone())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(run: Path, steps: int) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=run,
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_run_goes_on_with_the_batches_it_would_have_had(folder: Path, tmp_path: Path) -> None:
    augment = Augmentation(0.001, 3.0, (20.0, 30.0))
    model, data = Recorder(), module(folder, augment=augment)
    first = trainer(tmp_path / "run", 3)
    first.fit(model, data)
    checkpoint = tmp_path / "run" / "last.ckpt"
    first.save_checkpoint(checkpoint)
    resumed = Recorder()
    trainer(tmp_path / "run", 7).fit(resumed, module(folder, augment=augment), ckpt_path=checkpoint)
    want = [data.batches("train").make_training(i, 0, 1)["waveform"] for i in range(7)]
    seen = model.seen + resumed.seen
    assert len(seen) == 7
    assert all(torch.equal(a, b) for a, b in zip(want, seen))
    stored = torch.load(checkpoint, weights_only=True)["AudioDataModule"]
    assert stored == {"classes": ["no", "yes"], "sample_rate": 8000, "input": "waveform"}
    other, new = module(folder, sample_rate=4000, resample=True), trainer(tmp_path / "new", 8)
    with pytest.raises(ValueError, match="the checkpoint was trained with sample_rate 8000, got 4000"):
        new.fit(Recorder(), other, ckpt_path=checkpoint)


def test_real_digits_pack_to_their_published_size() -> None:
    if os.environ.get("SSM_MODAL_DATA") is None:
        pytest.skip("set SSM_MODAL_DATA to the folder that holds audio/fsdd/recordings")
    data = AudioDataModule(source="free_spoken_digits", sample_rate=8000, layout="windows", input="mu_law")
    predicted = samples = 0
    for batch in data.test_dataloader():
        predicted += batch["labels"].shape[1]
        samples += int((batch["labels"] < 256).sum())
    assert (samples, predicted) == (1_034_030, 1_034_330)

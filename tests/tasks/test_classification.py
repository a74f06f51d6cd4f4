"""Classification: sums by hand, tables, a run of the command line from a folder of recordings to predictions
of another, one process and two."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("soundfile")

from ssm_modal.cli.main import main
from ssm_modal.datamodules.audio import AudioDataModule
from ssm_modal.errors import ConfigError
from ssm_modal.io.wav import write_wav
from ssm_modal.layers import set_time_step_scale
from ssm_modal.plots import Example
from ssm_modal.tasks import Classification
from ssm_modal.tasks.classification_tables import (
    classes_table,
    confusion_table,
    predictions_table,
    telling_examples,
)
from ssm_modal.tasks.prediction_parts import prediction_key
from tests.tasks.processes import run
from tests.tasks.test_base import trainer

TINY: dict[str, Any] = {"n_classes": 2, "d_model": 8, "n_layers": 1, "d_state": 4, "kernel": 16, "stride": 8}
NAMES = ("high", "low")


def tones(folder: Path, *, labelled: bool = True, each: int = 10) -> Path:
    """`each` recordings a class at 8 kHz: tones near 1,500 and 300 Hz, of unequal length."""
    generator = torch.Generator().manual_seed(1)
    for label, pitch in zip(NAMES, (1500.0, 300.0)):
        for i in range(each):
            n = int(torch.randint(200, 500, (), generator=generator))
            time = torch.arange(n) / 8000
            wave = 0.3 * torch.sin(2 * math.pi * pitch * (1 + 0.01 * i) * time)
            write_wav(folder / label / f"{i}.wav" if labelled else folder / f"{label}_{i}.wav", wave, 8000)
    return folder


def data(folder: Path, **options: Any) -> AudioDataModule:
    settings: dict[str, Any] = {
        "sample_rate": 8000,
        "batch_samples": 2000,
        "val_fraction": 0.3,
        "test_fraction": 0.3,
        "seed": 1,
    }
    return AudioDataModule(str(folder), **{**settings, **options})


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


# ---------------------------------------------------------------- sums and tables


def test_sums_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classification("audio_classifier", {**TINY, "n_classes": 3}, label_smoothing=0.3)
    monkeypatch.setattr(task, "logits", lambda batch: batch["logits"])
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0], [1.0, 0.5, 0.0], [0.0, 0.0, 9.0]])
    labels = torch.tensor([0, 2, 0, -100])
    logs = logits.log_softmax(-1)
    plain = -(logs[0, 0] + logs[1, 2] + logs[2, 0])
    out = task.step({"logits": logits, "labels": labels}, "val")
    assert float(out.loss) == pytest.approx(float(plain), rel=1e-6)
    assert int(out.count) == 3
    assert [int(n) for n in out.sums["accuracy"]] == [2, 3]
    task.step({"logits": logits[:2], "labels": labels[:2]}, "val")
    assert task._confusion is not None
    assert task._confusion.sum(0).tolist() == [[3, 0, 0], [0, 0, 0], [0, 2, 0]]
    train = task.step({"logits": logits, "labels": labels}, "train")
    smoothed = 0.7 * plain - 0.3 * logs[:3].mean(-1).sum()
    assert float(train.loss) == pytest.approx(float(smoothed), rel=1e-6)
    assert not train.sums
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected \(4,\), one a sequence"):
        task.step({"logits": logits, "labels": labels[:3]}, "train")


def test_tables() -> None:
    matrix = torch.tensor([[3, 1], [0, 2]])
    names = ("a, b", "c")
    assert classes_table(matrix, names) == 'class,count,right\n"a, b",4,3\nc,2,2\n'
    assert confusion_table(matrix, names) == 'label,"a, b",c\n"a, b",3,1\nc,0,2\n'
    batches = [
        {
            "predicted": torch.tensor([1, 0]),
            "labels": torch.tensor([1, -100]),
            "probabilities": torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
            "recordings": torch.tensor([2, 0]),
        },
        {
            "predicted": torch.tensor([0]),
            "labels": torch.tensor([1]),
            "probabilities": torch.tensor([[1.0, 0.0]]),
            "recordings": torch.tensor([1]),
        },
    ]
    assert predictions_table(batches, ("x", "y"), ["p.wav", "q.wav", "r.wav"]) == (
        "file,predicted,probability,predicted_2,probability_2,label\n"
        "p.wav,x,0.500000,y,0.500000,\n"
        "q.wav,x,1.000000,y,0.000000,y\n"
        "r.wav,y,0.750000,x,0.250000,y\n"
    )
    one = predictions_table(batches, ("x", "y"), top_k=1)
    assert one == "file,predicted,probability,label\n0,x,0.500000,\n1,x,1.000000,y\n2,y,0.750000,y\n"
    numberless = [{k: v for k, v in batch.items() if k != "recordings"} for batch in batches]
    rows = predictions_table(numberless, ("x", "y")).splitlines()[1:]
    assert [row[:3] for row in rows] == ["0,y", "1,x", "2,x"]


def test_the_examples_are_the_wrong_ones_first() -> None:
    batch = {
        "predicted": torch.tensor([0, 1, 1, 0, 1]),
        "labels": torch.tensor([0, 0, 0, 0, -100]),
        "probabilities": torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3], [0.25, 0.75]]),
        "recordings": torch.tensor([10, 11, 12, 13, 14]),
    }
    found = telling_examples([batch], NAMES, 4)
    assert [one.number for one in found] == [12, 11, 13, 14]
    assert found[0] == Example(12, "low", pytest.approx(0.8), "high")
    assert [one.title for one in found[1:]] == ["low (60.0 %), is high", "high (70.0 %)", "low (75.0 %)"]
    assert telling_examples([{k: v for k, v in batch.items() if k != "recordings"}], NAMES, 4) == []


# ---------------------------------------------------------------- batches


def test_means_and_confusion_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    folder = tones(tmp_path / "data")
    task = Classification("audio_classifier", TINY)
    found = []
    for size in (1, 900, 100_000):
        module = data(folder, eval_batch_samples=size)
        assert module.batches("test").n_batches == {1: 6, 900: 3, 100_000: 1}[size]
        means = trainer(tmp_path / str(size)).test(task, module, verbose=False)[0]
        found.append((means, table(tmp_path / str(size) / "confusion.csv")))
    clips = module.clips("test")
    labels = torch.tensor([NAMES.index(str(clip.recording.label)) for clip in clips])
    with torch.no_grad():
        logits = torch.cat([task.model(clip.read()[None])[0] for clip in clips])
    for means, matrix in found:
        assert means["test/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert means["test/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        cells = torch.tensor([[int(cell) for cell in row[1:]] for row in matrix[1:]])
        assert cells.sum(1).tolist() == [3, 3]
        assert int(cells.diagonal().sum()) == round(6 * means["test/accuracy"])
    assert not (tmp_path / "1" / "confusion.png").exists()


# ---------------------------------------------------------------- from recordings to predictions


def command(name: str, folder: Path, run_dir: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "model": "ssm_modal.tasks.Classification",
        "model.model": "audio_classifier",
        **{f"model.overrides.{key}": value for key, value in TINY.items()},
        "data": "ssm_modal.datamodules.audio.AudioDataModule",
        "data.path": folder,
        "data.sample_rate": 8000,
        "data.batch_samples": 2000,
        "data.val_fraction": 0.3,
        "data.test_fraction": 0.3,
    }
    if name == "fit":
        settings |= {
            "trainer.max_steps": 60,
            "trainer.val_check_interval": 60,
            "trainer.log_every_n_steps": 10,
            "model.optimizer.lr": 0.02,
        }
    return [name, *(f"--{key}={value}" for key, value in {**settings, **options}.items())]


def test_a_folder_of_recordings_to_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("ssm_modal.tasks.classification._EXAMPLES", 2)  # drawing takes the most time here
    folder, run_dir = tones(tmp_path / "data"), tmp_path / "run"
    assert main([*command("fit", folder, run_dir), "--plots"]) == 0, capsys.readouterr().err
    assert "plots: false" in (run_dir / "config.yaml").read_text().splitlines()  # said once, of the model
    assert "    plots: true" in (run_dir / "config.yaml").read_text().splitlines()
    # Tones two octaves apart are told apart.
    assert table(run_dir / "classes.csv") == [
        ["class", "count", "right"],
        ["high", "3", "3"],
        ["low", "3", "3"],
    ]
    assert table(run_dir / "confusion.csv") == [["label", *NAMES], ["high", "3", "0"], ["low", "0", "3"]]
    assert (run_dir / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_dir / "results" / "test.json").read_text())["test/accuracy"] == 1.0

    assert main([*command("predict", folder, run_dir), "--plots"]) == 0, capsys.readouterr().err
    assert (run_dir / "results" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "results" / "relevance.png").read_bytes().startswith(b"\x89PNG")
    found = table(run_dir / "results" / "predictions.csv")
    assert found[0] == ["file", "predicted", "probability", "predicted_2", "probability_2", "label"]
    files = data(folder).predicted_files()
    assert [row[0] for row in found[1:]] == files
    assert len(files) == 6
    for file, predicted, first, other, second, label in found[1:]:
        assert predicted == label == Path(file).parent.name
        assert {predicted, other} == set(NAMES)
        assert float(first) + float(second) == pytest.approx(1, abs=2e-6)
        assert float(first) > 0.5

    # Examples of the test split, drawn by the data module; validation has its own folder.
    assert (run_dir / "examples.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command("validate", folder, run_dir), "--plots"]) == 0, capsys.readouterr().err
    written = sorted(file.name for file in (run_dir / "validation").iterdir())
    assert written == ["classes.csv", "confusion.csv", "confusion.png", "examples.png", "relevance.png"]
    assert sum(int(row[1]) for row in table(run_dir / "validation" / "classes.csv")[1:]) == 6

    # A folder without labels, by the run's own config; then one that has one class alone.
    others = tones(tmp_path / "others", labelled=False, each=3)
    own = ["predict", "--config", str(run_dir / "config.yaml"), "--data.init_args.predict=all"]
    unlabelled = [f"--data.init_args.path={others}", "--data.init_args.source=unlabelled"]
    assert main([*own, *unlabelled]) == 0, capsys.readouterr().err
    found = table(run_dir / "results" / "predictions.csv")[1:]
    assert [Path(row[0]).name for row in found] == sorted(f.name for f in others.iterdir())
    assert all(row[1] == Path(row[0]).name.split("_")[0] and row[5] == "" for row in found)
    for file in (folder / "high").iterdir():
        file.unlink()
    assert main([*own, f"--data.init_args.path={folder}"]) == 0, capsys.readouterr().err
    found = table(run_dir / "results" / "predictions.csv")[1:]
    assert len(found) == 10
    assert {row[1] for row in found} == {row[5] for row in found} == {"low"}

    before = (run_dir / "results" / "predictions.csv").read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssm_modal.io.atomic.os.replace", full)
    assert main([*own, *unlabelled]) == 1
    assert (run_dir / "results" / "predictions.csv").read_bytes() == before
    assert not list((run_dir / "results").rglob("*.tmp"))


def test_what_cannot_be_trained_leaves_the_earlier_run_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    folder, run_dir = tones(tmp_path / "data", each=1), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("earlier")
    assert main(command("fit", folder, run_dir, **{"model.schedule.warmup_steps": 60})) == 1
    assert "schedule.warmup_steps is 60, expected fewer than the 60 steps" in capsys.readouterr().err
    for file in (folder / "high").iterdir():
        file.write_bytes(b"no audio")
    (folder / "low" / "0.wav").write_bytes(b"no audio")
    assert main([*command("fit", folder, run_dir), "--skip-bad"]) == 1
    assert "holds no recording, expected one or more (2 were left out as bad)" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if file != folder] == ["run"]
    assert (run_dir / "config.yaml").read_text() == "earlier"


def test_bad_recordings_are_left_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    folder, run_dir = tones(tmp_path / "data"), tmp_path / "run"
    bad = folder / "low" / "broken.wav"
    bad.write_bytes(b"RIFF, but no more")
    assert main(command("fit", folder, run_dir, **{"trainer.max_steps": 2})) == 1
    assert str(bad) in capsys.readouterr().err
    short = {"trainer.max_steps": 2, "trainer.val_check_interval": 2}
    assert main([*command("fit", folder, run_dir, **short), "--skip-bad"]) == 0
    said = capsys.readouterr().err
    rows = table(run_dir / "left_out.csv")
    assert rows[0] == ["path", "reason"]
    assert [row[0] for row in rows[1:]] == [str(bad)]
    assert f"left out, and listed in {run_dir / 'left_out.csv'}:\n  {bad}: {rows[1][1]}\n" in said
    (run_dir / "left_out.csv").unlink()
    assert main([*command("predict", folder, run_dir), "--skip_bad"]) == 0, capsys.readouterr().err
    assert table(run_dir / "results" / "left_out.csv") == rows
    assert not (run_dir / "left_out.csv").exists()
    # Data without the option, a switch that is neither on nor off.
    tiny = [
        "fit",
        f"--run_dir={tmp_path / 'tiny'}",
        "--trainer.max_steps=1",
        "--data=tests.tasks.tiny.TinyData",
    ]
    tiny += ["--model=ssm_modal.tasks.LanguageModelling", "--model.model=mamba_lm"]
    for switch, message in (
        ("--skip-bad", "--skip_bad is given, but data is tests.tasks.tiny.TinyData, which has no option"),
        ("--plots", "--plots is given, but model is ssm_modal.tasks.LanguageModelling, which has no option"),
        ("--plots=perhaps", "--plots is 'perhaps', expected true, false or nothing"),
    ):
        assert main([*tiny, switch]) == 2
        assert message in capsys.readouterr().err


def test_a_killed_prediction_goes_on_and_writes_the_same(tmp_path: Path) -> None:
    """Killed behind its third batch of six; then the rest alone is gone through, and the tables are the same
    to the byte."""
    folder = tones(tmp_path / "data")
    Classification("audio_classifier", TINY).model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    options = {"model.init_from": tmp_path / "model", "data.eval_batch_samples": 1}
    assert run(command("predict", folder, tmp_path / "whole", **options)) == [0]
    results = tmp_path / "cut" / "results"
    count = tmp_path / "count"

    def counted(kill_after: int) -> dict[str, str]:
        own = f"{{file: {count}, kill_after: {kill_after}}}"
        return {"trainer.callbacks": f"[{{class_path: tests.tasks.tiny.Predicting, init_args: {own}}}]"}

    assert run(command("predict", folder, tmp_path / "cut", **options, **counted(3))) == [-9]
    (kept,) = results.glob(".predictions-*")
    assert sorted(file.name for file in kept.glob("*.pt")) == ["0.pt", "1.pt", "2.pt"]
    assert not (results / "predictions.csv").exists()
    assert run(command("predict", folder, tmp_path / "cut", **options, **counted(0))) == [0]
    assert count.read_text() == "3"
    whole = tmp_path / "whole" / "results"
    assert (results / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    first, second = (
        torch.load(f / "predictions.pt", weights_only=True)["predictions"] for f in (results, whole)
    )
    assert len(first) == len(second) == 6
    for a, b in zip(first, second):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert not list(results.glob(".predictions*"))


def test_what_is_kept_of_a_prediction_is_of_the_same_weights_and_files(tmp_path: Path) -> None:
    folder = tones(tmp_path / "data", each=2)
    task = Classification("audio_classifier", TINY)
    options: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0, "predict": "all"}

    def key(**more: Any) -> str:
        return prediction_key(task, data(folder, **options, **more), ["32-true"])

    first = key()
    assert key() == key(num_workers=1) == first
    assert len({first, key(eval_batch_samples=7), key(mono=True)}) == 3
    time = (folder / "low" / "0.wav").stat().st_mtime_ns
    os.utime(folder / "low" / "0.wav", ns=(time, time + 1000))
    changed = key()
    assert changed != first
    with torch.no_grad():
        next(task.parameters()).flatten()[0] += 1e-3
    assert key() != changed


def test_a_model_of_s4d_is_tested_at_half_its_rate(tmp_path: Path) -> None:
    """Every second sample and twice the time step: what the rescaled model says of those samples itself."""
    folder = tones(tmp_path / "data")
    tiny = {"n_classes": 2, "d_model": 8, "n_layers": 1, "d_state": 4}
    trained = Classification("audio_classifier_s4d", tiny)
    fitting = trainer(tmp_path / "run", max_steps=1)
    fitting.fit(trained, data(folder))
    ckpt = str(tmp_path / "trained.ckpt")
    fitting.save_checkpoint(ckpt)
    half = data(folder, keep_every=2)
    task = Classification("audio_classifier_s4d", tiny, time_step_scale=2.0)
    means = trainer(tmp_path / "half").test(task, half, ckpt_path=ckpt, verbose=False)[0]
    set_time_step_scale(trained.model, 2.0)
    with torch.no_grad():
        logits = torch.cat([trained.model(clip.read()[None, ::2])[0] for clip in half.clips("test")])
    labels = torch.tensor([NAMES.index(str(clip.recording.label)) for clip in half.clips("test")])
    assert means["test/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    plain = Classification("audio_classifier_s4d", tiny)
    with pytest.raises(ValueError, match=r"trained with sample_rate 8000, got 4000"):
        trainer(tmp_path / "plain").test(plain, half, ckpt_path=ckpt, verbose=False)
    with pytest.raises(ValueError, match=r"time_step_scale is 2\.0 in training, expected 1"):
        trainer(tmp_path / "fit", max_steps=1).fit(task, half)


def test_a_training_without_a_test_split_ends_well(tmp_path: Path) -> None:
    """Two recordings a class: no part of them is left for a test, which is said before the training."""
    module = data(tones(tmp_path / "data", each=2))
    task, run = Classification("audio_classifier", TINY), trainer(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match=r"test split of .* holds no recording, so nothing is tested"):
        run.fit(task, module)
    run.test(task, module, verbose=False)
    assert not (tmp_path / "classes.csv").exists()


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path: Path) -> None:
    folder = tones(tmp_path / "data")
    options = {"model.init_from": tmp_path / "model", "data.eval_batch_samples": 500}
    Classification("audio_classifier", TINY).model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    two = {"trainer.strategy": "ddp", "trainer.devices": 2}
    assert run(command("test", folder, tmp_path / "two", **options, **two), ranks=2) == [0, 0]
    assert run(command("test", folder, tmp_path / "one", **options)) == [0]
    for name in ("classes.csv", "confusion.csv"):
        assert table(tmp_path / "two" / name) == table(tmp_path / "one" / name)
    one, both = (json.loads((tmp_path / n / "results" / "test.json").read_text()) for n in ("one", "two"))
    assert both["test/loss"] == pytest.approx(one["test/loss"], rel=1e-6)
    assert both["test/accuracy"] == one["test/accuracy"]
    assert run(command("predict", folder, tmp_path / "two", **options, **two), ranks=2) == [0, 0]
    rows = table(tmp_path / "two" / "results" / "predictions.csv")[1:]
    assert [row[0] for row in rows] == data(folder).predicted_files()
    right = sum(row[1] == row[5] for row in rows)
    assert right == round(6 * one["test/accuracy"])


# ---------------------------------------------------------------- errors


def test_a_model_that_does_not_fit_the_data_is_named(tmp_path: Path) -> None:
    folder = tones(tmp_path / "data", each=2)
    plain: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0}
    ids = {key: value for key, value in TINY.items() if key not in ("kernel", "stride")}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (
            {**TINY, "n_classes": 3},
            {},
            r"the data has 2 classes \(high, low\), but the model's n_classes is 3",
        ),
        (TINY, {"input": "mu_law"}, "the data gives input 'mu_law', but the model's input is 'strided_wave"),
        ({**ids, "input": {"type": "ids", "vocab_size": 258}}, {}, "the data gives input 'waveform', but"),
        (
            {**ids, "input": {"type": "ids", "vocab_size": 256}},
            {"input": "mu_law"},
            "the data has a vocabulary of 258 ids, but the model's vocab_size is 256",
        ),
    ]
    for overrides, options, message in cases:
        with pytest.raises(ValueError, match=message):
            Classification("audio_classifier", overrides).check_data(data(folder, **plain, **options))
    mu_law = data(folder, **plain, input="mu_law")
    task = Classification("audio_classifier", {**ids, "input": {"type": "ids", "vocab_size": 258}})
    trainer(tmp_path, max_steps=1).fit(task, mu_law)
    assert task.class_names == NAMES


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0, expected 0 or more and below 1"):
        Classification("audio_classifier", TINY, label_smoothing=1.0)
    with pytest.raises(ConfigError, match="model is 'mamba_lm', expected a classifier"):
        Classification("mamba_lm", {"d_model": 8, "n_layers": 1})
    folder = tones(tmp_path / "data", labelled=False, each=1)
    with pytest.raises(ValueError, match="predict is 'none', expected one of test, all"):
        data(folder, predict="none")
    unlabelled = data(folder, source="unlabelled", predict="all")
    assert len(unlabelled.predicted_files()) == 2
    with pytest.raises(ValueError, match=r"no recording of .* has a label, expected labels to train by"):
        unlabelled.batches("train")
    with pytest.raises(ValueError, match="the batch has the keys labels, expected one of ids, waveform"):
        Classification("audio_classifier", TINY).logits({"labels": torch.zeros(1)})

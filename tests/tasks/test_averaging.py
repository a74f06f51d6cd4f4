"""WeightAverage: what it averages, and that the average is what is validated, tested and loaded."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import ssm_modal
from ssm_modal.cli.callbacks import WeightAverage
from ssm_modal.cli.main import main
from tests.tasks.processes import run
from tests.tasks.tiny import assert_same, command, load, weights

DECAY = 0.8


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


class Follow(Callback):
    """Averages by hand: the weights after each step in `all`."""

    all: ClassVar[list[dict[str, torch.Tensor]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Follow.all = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        Follow.all.append({k: v.detach().clone() for k, v in pl_module.state_dict().items()})


def averaging(*more: str, start: int = 0) -> dict[str, str]:
    own = (
        "{class_path: ssm_modal.cli.callbacks.WeightAverage, "
        f"init_args: {{decay: {DECAY}, start_step: {start}}}}}"
    )
    return {"trainer.callbacks": f"[{', '.join([own, *more])}]"}


@pytest.mark.parametrize("start", [0, 3])
def test_the_average_is_saved_tested_and_loaded(tmp_path: Path, start: int) -> None:
    follow = "{class_path: tests.tasks.test_averaging.Follow}"
    folder = tmp_path / "run"
    options = {"model.stream": "validate", "test_after_fit": "true"}
    assert main(command(folder, max_steps=8, **options, **averaging(follow, start=start))) == 0

    assert len(Follow.all) == 8
    # Up to step `start` the average is the weights.
    first = max(start, 1)
    expected = Follow.all[first - 1]
    for later in Follow.all[first:]:
        expected = {k: DECAY * expected[k] + (1 - DECAY) * v for k, v in later.items()}
    saved = weights(folder)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-7)
        assert torch.equal(load(folder)["current_model_state"][name], Follow.all[-1][name])
    assert not torch.equal(saved["model.embedding.weight"], Follow.all[-1]["model.embedding.weight"])

    model = ssm_modal.load_pretrained(folder / "checkpoints" / "last.ckpt")
    assert_same(dict(model.state_dict()), {k.removeprefix("model."): v for k, v in saved.items()})

    # Validation, in training and after it, and the test took the average: its rows are the same batches.
    rows = (folder / "metrics.csv").read_text().splitlines()
    names, values = rows[0].split(","), [line.split(",") for line in rows[1:]]
    logged = {n: float(v) for line in values for n, v in zip(names, line) if n.startswith("val/") and v}
    tested = json.loads((folder / "results" / "test.json").read_text())
    if tested["checkpoint"].endswith("best.ckpt") and load(folder, "best")["global_step"] == 8:
        assert tested["test/loss"] == pytest.approx(logged["val/loss"], rel=1e-5)
    assert main(["validate", *command(folder, **options)[1:], "--ckpt_path=last"]) == 0
    again = json.loads((folder / "results" / "validate.json").read_text())
    for name in ("val/loss", "val/stream_loss"):
        assert again[name] == pytest.approx(logged[name], rel=1e-5)


def test_killed_and_resumed_equals_left_alone(tmp_path: Path) -> None:
    steps = 8
    assert main(command(tmp_path / "alone", max_steps=steps, **averaging(start=2))) == 0
    kill = f"{{class_path: tests.tasks.tiny.KillAt, init_args: {{batch: {random.randint(2, steps)}}}}}"
    broken = tmp_path / "broken"
    assert run(command(broken, max_steps=steps, **averaging(kill, start=2))) == [-signal.SIGKILL]
    assert main([*command(broken, max_steps=steps, **averaging(start=2)), "--ckpt_path=last"]) == 0
    assert_same(weights(broken), weights(tmp_path / "alone"))
    assert_same(load(broken)["current_model_state"], load(tmp_path / "alone")["current_model_state"])


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("decay", -0.1), ("start_step", -1)])
def test_wrong_arguments(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected"):
        WeightAverage(**{name: value})  # type: ignore[arg-type]


def test_with_accumulation_the_average_starts_at_its_step(tmp_path: Path) -> None:
    follow = "{class_path: tests.tasks.test_averaging.Follow}"
    options = {"trainer.accumulate_grad_batches": 2, **averaging(follow, start=3)}
    assert main(command(tmp_path / "run", max_steps=5, **options)) == 0
    third, fourth, fifth = Follow.all[5::2]
    for name, value in weights(tmp_path / "run").items():
        expected = DECAY * (DECAY * third[name] + (1 - DECAY) * fourth[name]) + (1 - DECAY) * fifth[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_the_average_has_the_dtype_of_the_weights(tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "run"
    assert main(command(folder, max_steps=4, **{"trainer.precision": precision}, **averaging(start=2))) == 0
    ours, average = load(folder)["current_model_state"], weights(folder)
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert {v.dtype for v in (*ours.values(), *average.values())} == {wide}
    assert not torch.equal(ours["model.embedding.weight"], average["model.embedding.weight"])


def test_half_precision_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"trainer.precision": "bf16-true", **averaging()}
    assert main(command(tmp_path / "run", max_steps=2, **options)) == 1
    error = capsys.readouterr().err
    assert "WeightAverage: the weight model.embedding.weight is bfloat16, too coarse" in error
    assert "bf16-mixed or 16-mixed instead of bf16-true" in error


def test_going_on_without_the_callback_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(command(folder, max_steps=2, **averaging())) == 0
    before = weights(folder)
    assert main([*command(folder, max_steps=4), "--ckpt_path=last"]) == 1
    assert "of a run that averages its weights, but this one does not" in capsys.readouterr().err
    assert_same(weights(folder), before)
    # Another run may start from the average, and an average may start late.
    assert main(command(tmp_path / "new", max_steps=2, **{"model.init_from": folder})) == 0
    options = averaging()
    assert main([*command(tmp_path / "new", max_steps=3, **options), "--ckpt_path=last"]) == 0
    assert "current_model_state" in load(tmp_path / "new")


@pytest.mark.slow
def test_two_processes_keep_one_average(tmp_path: Path) -> None:
    """And go on with it: as one process over the same batches."""
    still = {"model.overrides.dropout": 0.0, "model.optimizer.eps": 1e-3, "model.schedule.kind": "constant"}
    two = {
        "trainer.strategy": "ddp",
        "trainer.devices": 2,
        "data.batch_size": 2,
        **still,
        **averaging(start=2),
    }
    folder = tmp_path / "two"
    assert run(command(folder, max_steps=4, **two), ranks=2) == [0, 0]
    assert run([*command(folder, max_steps=8, **two), "--ckpt_path=last"], ranks=2) == [0, 0]
    one = {"data.batch_size": 4, **still, **averaging(start=2)}
    assert run(command(tmp_path / "one", max_steps=8, **one)) == [0]
    for get in (weights, lambda path: load(path)["current_model_state"]):
        for name, value in get(tmp_path / "one").items():
            torch.testing.assert_close(get(folder)[name], value, rtol=1e-4, atol=1e-6)

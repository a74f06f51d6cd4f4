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
    for now in Follow.all[first:]:
        expected = {k: DECAY * expected[k] + (1 - DECAY) * v for k, v in now.items()}
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

"""A loss or gradient that is not finite stops the run, and the message says when and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ssm_modal.cli.main import main
from tests.tasks.processes import run
from tests.tasks.tiny import assert_same, command, load, weights


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


class Poison(Callback):
    """From training batch `batch` to `until`, make the output of the module called `where` (or a gradient)
    NaN, in training alone."""

    def __init__(self, batch: int, where: str, what: str = "output", until: int = 1000) -> None:
        self.batch, self.where, self.what, self.until = batch, where, what, until

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress

        def spoil(value: torch.Tensor) -> torch.Tensor:
            now = pl_module.training and self.batch <= progress.total.ready <= self.until
            return value * torch.nan if now else value

        if self.what == "gradient":
            pl_module.get_parameter(self.where).register_hook(spoil)
        else:
            pl_module.get_submodule(self.where).register_forward_hook(lambda m, i, out: spoil(out))


class InfiniteLoss(Callback):
    """On process `rank` the loss of training batch `batch` is infinite, though its gradient is finite; each
    process writes down what stops it."""

    def __init__(self, batch: int, rank: int) -> None:
        self.batch, self.rank = batch, rank

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if (trainer.global_rank, batch) == (self.rank, self.batch):
            loss.data.fill_(torch.inf)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Path(trainer.default_root_dir, f"stopped-{trainer.global_rank}").write_text(str(exception))


def poison(**init: Any) -> dict[str, str]:
    inside = ", ".join(f"{k}: {v}" for k, v in init.items())
    return {"trainer.callbacks": f"[{{class_path: tests.tasks.test_nan.Poison, init_args: {{{inside}}}}}]"}


def linear_name() -> str:
    """A linear layer inside the model's last mixer, by its full name in the task."""
    import ssm_modal
    from tests.tasks.tiny import OVERRIDES

    model = ssm_modal.create_model("mamba_lm", **OVERRIDES)
    return "model." + next(n for n, m in model.named_modules() if n.endswith("out_proj"))


# A fused optimizer leaves broken steps out itself, and the run learns of them a step later.
FUSED = pytest.mark.parametrize("fused", ["false", "true"])


@FUSED
@pytest.mark.parametrize("accumulate", [1, 2])
def test_says_at_which_step_and_in_which_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int, fused: str
) -> None:
    run_dir, where = tmp_path / "run", linear_name()
    # With accumulation the third step is batches 5 and 6: the first of them is broken already.
    batch = 3 if accumulate == 1 else 5
    options = {"trainer.accumulate_grad_batches": accumulate, **poison(batch=batch, where=where)}
    options["model.optimizer.fused"] = fused
    assert main(command(run_dir, max_steps=6, **options)) == 1
    error = capsys.readouterr().err
    assert f"the loss is nan at step 3 (batch {batch})" in error
    assert f"first showed in the output of {where} (Linear)" in error
    saved = load(run_dir)
    assert saved["global_step"] == 2
    assert all(v.isfinite().all() for v in saved["state_dict"].values())


@FUSED
@pytest.mark.parametrize("after", ["validation", "end"])
def test_a_broken_step_before_a_validation_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: str, fused: str
) -> None:
    """Nothing is measured or saved with what follows it, and the layer is found as in the training."""
    run_dir, where = tmp_path / "run", linear_name()
    options = {**poison(batch=4, where=where), "model.optimizer.fused": fused}
    options |= {"trainer.val_check_interval": 4 if after == "validation" else 100}
    options |= {"checkpoint.every_n_steps": 1 if after == "validation" else 100}
    assert main(command(run_dir, max_steps=4 if after == "end" else 6, **options)) == 1
    error = capsys.readouterr().err
    assert "the loss is nan at step 4 (batch 4)" in error
    assert f"first showed in the output of {where} (Linear)" in error
    if after == "end":
        assert not (run_dir / "checkpoints").exists()
        return
    assert load(run_dir)["global_step"] == 3
    assert "val/loss" not in (run_dir / "metrics.csv").read_text()
    # What is wrong put right, the run goes on from before it.
    options = {"trainer.val_check_interval": 4, "model.optimizer.fused": fused}
    assert main([*command(run_dir, max_steps=6, **options), "--ckpt_path=last"]) == 0
    assert main(command(tmp_path / "sound", max_steps=6, **options)) == 0
    assert_same(weights(run_dir), weights(tmp_path / "sound"))


@FUSED
def test_gradient_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], fused: str) -> None:
    name = linear_name() + ".weight"
    options = {**poison(batch=2, where=name, what="gradient"), "model.optimizer.fused": fused}
    assert main(command(tmp_path / "run", max_steps=6, **options)) == 1
    error = capsys.readouterr().err
    assert "the loss is finite at step 2 but the gradient is not" in error
    assert f"the gradient of {name} (1 in all)" in error
    assert load(tmp_path / "run")["global_step"] == 1


@pytest.mark.parametrize("every", [1, 100])
def test_weights_stay_where_the_step_was_left_out(tmp_path: Path, every: int) -> None:
    """One bad gradient, good ones after it: the bad step changes no weight, and the next is not taken."""
    name = linear_name() + ".weight"
    options = {**poison(batch=3, where=name, what="gradient", until=3), "model.optimizer.fused": "true"}
    options |= {"checkpoint.every_n_steps": every, "trainer.val_check_interval": 100}
    watch = "{class_path: tests.tasks.test_nan.LastWeights}"
    options["trainer.callbacks"] = options["trainer.callbacks"][:-1] + f", {watch}]"
    assert main(command(tmp_path / "run", max_steps=6, **options)) == 1
    first, second, third = LastWeights.seen
    for key, value in second.items():
        assert torch.equal(third[key], value)
        assert not torch.equal(first[key], value)


@pytest.mark.slow
@FUSED
def test_no_process_takes_a_step_that_another_finds_broken(tmp_path: Path, fused: str) -> None:
    own = "{class_path: tests.tasks.test_nan.InfiniteLoss, init_args: {batch: 3, rank: 1}}"
    options = {"trainer.callbacks": f"[{own}]", "model.optimizer.fused": fused}
    options |= {"trainer.strategy": "ddp", "trainer.devices": 2}
    assert run(command(tmp_path / "run", max_steps=6, **options), ranks=2) == [1, 1]
    assert load(tmp_path / "run")["global_step"] == 2
    first, second = ((tmp_path / "run" / f"stopped-{rank}").read_text() for rank in (0, 1))
    assert first.startswith("the loss of another process is not finite at step 3, its message says more")
    assert second.startswith("the loss is inf at step 3 (batch 3)")


class LastWeights(Callback):
    """The weights after each optimizer step."""

    seen: ClassVar[list[dict[str, torch.Tensor]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        LastWeights.seen = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        LastWeights.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def test_names_a_parameter_that_was_broken_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tasks import tiny

    start = tiny.TinyData.setup

    def setup(self: Any, stage: str) -> None:
        start(self, stage)
        with torch.no_grad():
            dict(self.trainer.lightning_module.named_parameters())[linear_name() + ".weight"][0, 0] = (
                torch.inf
            )

    monkeypatch.setattr(tiny.TinyData, "setup", setup)
    assert main(command(tmp_path / "run", max_steps=6)) == 1
    error = capsys.readouterr().err
    assert "at step 1" in error
    assert f"the parameter {linear_name()}.weight" in error
    assert "there is no checkpoint yet" in error
    assert not (tmp_path / "run" / "checkpoints").exists()

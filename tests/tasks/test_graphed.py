"""A training step as a CUDA graph: its bookkeeping anywhere, the law (graphed equals plain) on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssm_modal.cli.callbacks import CudaGraphs
from ssm_modal.cli.main import main
from ssm_modal.tasks import LanguageModelling
from ssm_modal.tasks.graphed import WARM_UP, GraphedStep, Recording
from ssm_modal.tasks.step_output import StepOutput
from tests.tasks.tiny import command, load, weights


class Played:
    """What a graph does, without one: a step whose results land in the same tensors every time."""

    def __init__(self) -> None:
        self.weight = torch.tensor([2.0, 3.0], requires_grad=True)
        self.unused = torch.ones(3, requires_grad=True)
        self.recorded: list[Mapping[str, Tensor]] = []

    def step(self, batch: Mapping[str, Tensor]) -> StepOutput:
        loss = (self.weight * batch["x"]).sum() ** 2
        return StepOutput(loss, torch.tensor(batch["x"].numel()), {"x": (batch["x"].sum(), torch.ones(()))})

    def record(self, batch: Mapping[str, Tensor]) -> Recording:
        self.recorded.append(batch)
        inputs = {name: torch.full_like(value, torch.nan) for name, value in batch.items()}
        loss, count, total = torch.zeros(()), torch.zeros(()), torch.zeros(())
        gradient = torch.zeros(2)

        def replay() -> None:
            with torch.enable_grad():
                out = self.step(inputs)
                (g,) = torch.autograd.grad(out.loss, [self.weight])
            loss.copy_(out.loss.detach())
            count.copy_(out.count)
            total.copy_(out.sums["x"][0])
            gradient.copy_(g)

        return Recording(
            replay, inputs, StepOutput(loss, count, {"x": (total, torch.ones(()))}), [gradient, None]
        )

    def graphed(self, most: int = 16) -> GraphedStep:
        return GraphedStep(self.step, [self.weight, self.unused], most=most, record=self.record)


def batch(*values: float) -> dict[str, Tensor]:
    return {"x": torch.tensor(values)}


def test_each_kind_is_recorded_after_its_warm_up_and_then_replayed() -> None:
    one = Played()
    graphed = one.graphed()
    for turn in range(5):
        x = batch(1.0, float(turn))
        out = graphed(x)
        (2 * out.loss).backward()
        # d/dw (w.x)^2 = 2 (w.x) x, twice.
        dot = 2.0 + 3.0 * turn
        assert out.loss.item() == dot**2
        assert out.count.item() == 2
        assert out.sums["x"][0].item() == 1 + turn
        assert one.weight.grad is not None
        assert one.unused.grad is None
        assert one.weight.grad.tolist() == [4 * dot, 4 * dot * turn]
        one.weight.grad = None
        assert len(one.recorded) == (turn >= WARM_UP)


def test_gradients_add_up_over_replays() -> None:
    one = Played()
    graphed = one.graphed()
    for _ in range(WARM_UP):
        graphed(batch(1.0, 1.0))
    first = graphed(batch(1.0, 0.0))
    first.loss.backward()
    graphed(batch(0.0, 1.0)).loss.backward()
    assert one.weight.grad is not None
    assert one.weight.grad.tolist() == [4.0, 6.0]
    assert first.loss.item() == 4.0, "an earlier loss changed"


def test_a_backward_after_the_next_step_raises() -> None:
    one = Played()
    graphed = one.graphed()
    for _ in range(WARM_UP):
        graphed(batch(1.0, 1.0))
    first = graphed(batch(1.0, 0.0)).loss
    graphed(batch(0.0, 1.0))
    with pytest.raises(RuntimeError, match="after the next step"):
        first.backward()


def test_moved_weights_are_recorded_anew() -> None:
    one = Played()
    graphed = one.graphed()
    for _ in range(WARM_UP + 1):
        graphed(batch(1.0, 1.0))
    one.weight.data = one.weight.data.clone()
    assert graphed(batch(1.0, 0.0)).loss.item() == 4.0
    assert len(one.recorded) == 2


def test_what_cannot_be_recorded() -> None:
    graphed = Played().graphed(most=1)
    with pytest.raises(ValueError, match="batch's 'seqs' is a int"):
        graphed({"x": torch.ones(2), "seqs": 3})
    for _ in range(WARM_UP + 1):
        graphed(batch(1.0, 1.0))
    for _ in range(WARM_UP):
        graphed({"x": torch.ones(1, 2)})
    with pytest.raises(RuntimeError, match=r"at most 1 kinds of batches.*x \(1, 2\) float32"):
        graphed({"x": torch.ones(1, 2)})


def test_a_mixture_of_experts_is_refused() -> None:
    task = LanguageModelling("jamba_lm", {"vocab_size": 11, "d_model": 16, "n_layers": 2})
    with pytest.raises(ValueError, match="is a mixture of experts"):
        task.train_by_graphs(16)


def graphs(**options: object) -> dict[str, object]:
    return {"trainer.callbacks": "[{class_path: ssm_modal.cli.callbacks.CudaGraphs}]", **options}


def test_on_a_cpu_it_says_so_and_trains_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert main(command(tmp_path / "plain", max_steps=3)) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "graphs", max_steps=3, **graphs())) == 0
    assert "CudaGraphs: the device cpu has none" in capsys.readouterr().out
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, weights(tmp_path / "graphs")[name])
    with pytest.raises(ValueError, match="most is 0"):
        CudaGraphs(0)


def played_again(self: GraphedStep, given: Mapping[str, Tensor]) -> Recording:
    """A recording without a graph: each replay is the step itself, into the same tensors."""
    inputs = {name: value.clone() for name, value in given.items()}
    loss, count = torch.zeros(()), torch.zeros(())
    gradients = [torch.zeros_like(p) for p in self.parameters]

    def replay() -> None:
        with torch.enable_grad():
            out = self.step(inputs)
            found = torch.autograd.grad(out.loss, self.parameters)
        loss.copy_(out.loss.detach())
        count.copy_(out.count)
        for place, gradient in zip(gradients, found):
            place.copy_(gradient)

    return Recording(replay, inputs, StepOutput(loss, count), list(gradients))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_by_recordings_equals_plain_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(GraphedStep, "_record_graph", played_again)
    monkeypatch.setattr(CudaGraphs, "on_fit_start", lambda self, trainer, task: task.train_by_graphs(16))
    options = {
        "trainer.gradient_clip_val": 1.0,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.val_check_interval": 4 * accumulate,
        "data.uneven": "true",
    }
    assert main(command(tmp_path / "plain", max_steps=6, **options)) == 0
    assert main(command(tmp_path / "graphed", max_steps=6, **graphs(**options))) == 0
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "graphed")[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_graphed_equals_plain_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, accumulate: int
) -> None:
    """Dropout, clipping, accumulation, uneven labels, a resume; equal but for the order of sums."""
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    options = {
        "trainer.accelerator": "gpu",
        "trainer.devices": 1,
        "trainer.precision": precision,
        "trainer.gradient_clip_val": 1.0,
        "trainer.accumulate_grad_batches": accumulate,
        "data.uneven": "true",
        "model.schedule.total_steps": 12,
    }
    plain, graphed = tmp_path / "plain", tmp_path / "graphed"
    assert main(command(plain, max_steps=12, **options)) == 0
    assert main(command(graphed, max_steps=7, **graphs(**options))) == 0
    assert main([*command(graphed, max_steps=12, **graphs(**options)), "--ckpt_path=last"]) == 0
    assert load(graphed)["global_step"] == 12
    a = torch.cat([v.flatten().float() for v in weights(plain, "last").values()])
    b = torch.cat([v.flatten().float() for v in weights(graphed, "last").values()])
    # Twelve steps of 0.01 move a weight by about 0.1; a gradient that is all rounding may take another sign.
    error = (a - b).abs().mean().item()
    assert error < (2e-4 if precision == "32-true" else 2e-3), error


WAITING = """
import torch
from ssm_modal.tasks.graphed import WARM_UP, GraphedStep
from ssm_modal.tasks.step_output import StepOutput

weight = torch.ones(2, device="cuda", requires_grad=True)

def step(given):
    float(given["x"].sum())
    return StepOutput((weight * given["x"]).sum(), torch.ones((), device="cuda"))

graphed = GraphedStep(step, [weight])
given = {"x": torch.ones(2, device="cuda")}
for _ in range(WARM_UP):
    graphed(given)
try:
    graphed(given)
except RuntimeError as error:
    assert "cannot be recorded as a CUDA graph" in str(error), error
else:
    raise AssertionError("recorded")
"""


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_refused() -> None:
    """In a process of its own: a recording that failed leaves torch's generator in its midst."""
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

"""Tasks that train by segments, or with their blocks computed again: the same training in less memory."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssm_modal
from ssm_modal.backbone import Backbone, BackboneConfig
from ssm_modal.cli.main import main
from ssm_modal.datamodules.synthetic import SyntheticDataModule
from ssm_modal.heads import long_loss
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import BidirectionalConfig, MambaConfig
from ssm_modal.tasks import LanguageModelling, SyntheticTask
from ssm_modal.tasks.optimizers import OptimizerConfig
from tests.tasks.processes import run
from tests.tasks.test_base import trainer
from tests.tasks.tiny import OVERRIDES, VOCAB, TinyData, assert_same, command, weights
from tests.tolerances import assert_close, relative_error

STILL = {**OVERRIDES, "dropout": 0.0}
# Adam divides by the root of the gradient's square: a larger eps keeps rounding from being magnified.
ADAM = OptimizerConfig(lr=0.01, eps=1e-3)


def language(**options: Any) -> LanguageModelling:
    torch.manual_seed(0)
    return LanguageModelling("mamba_lm", options.pop("overrides", STILL), optimizer=ADAM, **options)


def assert_alike(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    theirs = dict(b.named_parameters())
    for name, p in a.named_parameters():
        assert_close(p, theirs[name], tolerance, name)


# ---------------------------------------------------------------------- Lightning


@pytest.mark.parametrize("option", [{"segment": 5}, {"segment": 1}, {"recompute": "blocks"}])
def test_fit_with_clipping_and_accumulation_is_the_same(tmp_path: Path, option: dict[str, Any]) -> None:
    tasks = []
    for given in ({}, option):
        task = language(**given)
        before = {n: p.detach().clone() for n, p in task.named_parameters()}
        fit = trainer(
            tmp_path,
            precision="64-true",
            max_steps=3,
            gradient_clip_val=0.05,
            accumulate_grad_batches=2,
        )
        fit.fit(task, TinyData(uneven=True))
        tasks.append((task, float(fit.callback_metrics["val/loss"])))
        assert any(relative_error(p, before[n]) > 1e-3 for n, p in task.named_parameters())
    assert_alike(tasks[1][0], tasks[0][0], 1e-10)
    assert tasks[1][1] == pytest.approx(tasks[0][1], rel=1e-12)


def test_blocks_are_recomputed_with_the_same_dropout(tmp_path: Path) -> None:
    tasks = []
    for recompute in ("none", "blocks"):
        task = language(overrides=OVERRIDES, recompute=recompute)
        assert task.model.backbone.gradient_checkpointing == (recompute == "blocks")
        torch.manual_seed(1)
        trainer(tmp_path, precision="64-true").fit(task, TinyData())
        tasks.append(task)
    assert_alike(tasks[1], tasks[0], 1e-10)


@pytest.mark.parametrize("segment", [5, None])
def test_bf16_mixed_trains_as_plain(tmp_path: Path, segment: int | None) -> None:
    """Four steps under autocast end near fp32's, as near as without segments."""
    ends = {}
    for name, precision, option in (
        ("exact", "32-true", {}),
        ("plain", "bf16-mixed", {}),
        ("long", "bf16-mixed", {"segment": segment, "recompute": "blocks"}),
    ):
        task = language(**option)
        trainer(tmp_path, precision=precision, max_steps=4, gradient_clip_val=1.0).fit(task, TinyData())
        ends[name] = {n: p.detach() for n, p in task.named_parameters()}
        assert all(p.dtype == torch.float32 for p in ends[name].values())
    for name, exact in ends["exact"].items():
        plain = relative_error(ends["plain"][name], exact)
        assert relative_error(ends["long"][name], exact) < 2 * max(plain, 1e-3), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_fit_by_segments_on_a_gpu(tmp_path: Path, precision: Any) -> None:
    """With GradScaler in fp16: as the plain task, step by step, whose steps the scaler must not skip."""
    ends = []
    for option in ({}, {"segment": 5}):
        task = language(**option)
        fit = trainer(
            tmp_path, accelerator="gpu", devices=1, precision=precision, max_steps=4, gradient_clip_val=0.5
        )
        fit.fit(task, TinyData())
        ends.append({n: p.detach().cpu() for n, p in task.named_parameters()})
    for name, plain in ends[0].items():
        assert relative_error(ends[1][name], plain) < (1e-4 if precision == "32-true" else 3e-2), name


def test_resumed_equals_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with dropout, in the middle of nothing: what segments need is not in the checkpoint."""
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    options: dict[str, Any] = {"model.segment": 5, "model.overrides.dropout": 0.3}
    options["model.schedule.kind"] = "constant"
    assert main(command(tmp_path / "alone", max_steps=4, **options)) == 0
    assert main(command(tmp_path / "broken", max_steps=2, **options)) == 0
    assert main([*command(tmp_path / "broken", max_steps=4, **options), "--ckpt_path=last"]) == 0
    assert_same(weights(tmp_path / "broken"), weights(tmp_path / "alone"))
    assert (
        main(command(tmp_path / "still", max_steps=4, **{"model.segment": 5, "model.overrides.dropout": 0.0}))
        == 0
    )
    other = weights(tmp_path / "still")
    assert any(not torch.equal(v, other[n]) for n, v in weights(tmp_path / "alone").items())


@pytest.mark.slow
def test_two_processes_by_segments_train_as_one_without(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4,
        "model.overrides.dropout": 0.0,
        "data.uneven": "true",
        "model.optimizer.eps": 1e-3,
        "trainer.gradient_clip_val": 0.5,
        "trainer.accumulate_grad_batches": 2,
    }
    two = {"trainer.strategy": "ddp", "trainer.devices": 2, "data.batch_size": 2, "model.segment": 5}
    assert run(command(tmp_path / "two", **options, **two), ranks=2) == [0, 0]
    assert run(command(tmp_path / "one", **options, **{"data.batch_size": 4})) == [0]
    one, both = (weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-6, msg=name)
    losses = []
    for name in ("one", "two"):
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            losses.append([float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) >= 4


# ---------------------------------------------------------------------- batches


def gradients(task: Any, batch: Mapping[str, Any], stage: str = "train") -> tuple[Tensor, list[Tensor]]:
    out = task.step(batch, stage)
    return out.loss.detach(), list(torch.autograd.grad(out.loss, list(task.parameters())))


def test_packed_batches() -> None:
    ids, labels = (torch.randint(VOCAB, (1, 24)) for _ in range(2))
    labels[0, [4, 17]] = -100
    batch = {"ids": ids, "labels": labels, "seqs": Sequences.from_lengths([5, 13, 6])}
    whole, want = gradients(language().double(), batch)
    for option in ({"segment": 7}, {"recompute": "blocks"}):
        loss, got = gradients(language(**option).double(), batch)
        assert_close(loss, whole, 1e-12)
        for g, w in zip(got, want):
            assert_close(g, w, 1e-10)


@pytest.mark.parametrize("option", [{"segment": 5}, {"recompute": "blocks"}])
def test_predictions_without_all_logits(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TinyData(uneven=True).val_batch(1, 0, 1)
    plain = language().eval().predict_step(batch, 0)
    monkeypatch.setattr(long_loss, "default_chunk", lambda vocab_size, device: 4)
    task = language(**option).eval()
    rows: list[int] = []
    task.model.head.register_forward_hook(lambda head, given, out: rows.append(out.shape[0]))
    long = task.predict_step(batch, 0)
    assert max(rows) <= 4
    assert sum(rows) == batch["ids"].numel()
    assert plain.keys() == long.keys()
    torch.testing.assert_close(long["nats"], plain["nats"])
    assert torch.equal(long["labels"], plain["labels"])


@pytest.mark.parametrize("task_name", ["induction_heads", "selective_copying"])
def test_a_synthetic_task_by_segments(task_name: str) -> None:
    data = SyntheticDataModule(task=task_name, length=40, batch_size=3, lengths=[40], sequences=2)
    overrides = {**STILL, "vocab_size": data.vocab_size}
    results = []
    for option in ({}, {"train_segment": 7}, {"train_segment": 100}):
        torch.manual_seed(0)
        task = SyntheticTask("mamba_lm", overrides, **option).double()
        batch = task.transfer_batch_to_device(data.train_batch(0), torch.device("cpu"), 0)
        predicted = task.predict_step(batch, 0)["predicted"]
        results.append((*gradients(task, batch), predicted))
    for loss, got, predicted in results[1:]:
        assert_close(loss, results[0][0], 1e-12)
        assert torch.equal(predicted, results[0][2])
        for g, w in zip(got, results[0][1]):
            assert_close(g, w, 1e-10)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("segment", [0, -1, 2.5, True])
def test_bad_segments_are_named(segment: Any) -> None:
    with pytest.raises(ValueError, match=rf"^segment is {segment}, expected a whole number of 1 or more"):
        language(segment=segment)
    with pytest.raises(ValueError, match=rf"^train_segment is {segment}, expected a whole number"):
        SyntheticTask("mamba_lm", STILL, train_segment=segment)


def test_bad_recompute_is_named() -> None:
    with pytest.raises(ValueError, match="recompute is 'layers', expected none or blocks"):
        language(recompute="layers")


def test_a_model_that_needs_the_whole_sequence_is_sent_to_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = BackboneConfig(8, 1, MambaConfig(), bidirectional=BidirectionalConfig())
            self.backbone = Backbone(self.config)

    monkeypatch.setattr(ssm_modal, "create_model", lambda name, **overrides: Both())
    with pytest.raises(ValueError, match=r"segment is 8, but both_ways has a layer .* recompute: blocks"):
        LanguageModelling("both_ways", segment=8)
    assert LanguageModelling("both_ways", recompute="blocks").model.backbone.gradient_checkpointing
    monkeypatch.setattr(ssm_modal, "create_model", lambda name, **overrides: Plain())
    for option in ({"segment": 8}, {"recompute": "blocks"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(option))} needs a model with a backbone, Plain has"
        ):
            LanguageModelling("plain", **option)


class Plain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config = BackboneConfig(8, 1)

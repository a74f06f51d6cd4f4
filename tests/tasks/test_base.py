"""Parameter groups, schedules, exact means, weights to start from, and the errors of a training task."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import ssm_modal
from ssm_modal.errors import CheckpointError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.tasks import LanguageModelling, TrainingTask
from ssm_modal.tasks.architecture import architecture_differences, config_differences
from ssm_modal.tasks.base import token_loss
from ssm_modal.tasks.optimizers import OptimizerConfig, build_optimizer, no_decay_names, parameter_groups
from ssm_modal.tasks.schedules import ScheduleConfig, build_schedule, schedule_factor
from tests.tasks.tiny import OVERRIDES, VOCAB, TinyData


def small(**overrides: Any) -> nn.Module:
    return ssm_modal.create_model("mamba_lm", **{**OVERRIDES, **overrides})


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_epochs": -1,
            "max_steps": 2,
            "check_val_every_n_epoch": None,
            "val_check_interval": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


# ---------------------------------------------------------------------- parameter groups


def test_no_decay_for_ssm_parameters_biases_and_norms() -> None:
    model = small()
    still = no_decay_names(model)
    for name, parameter in model.named_parameters():
        marked = any(part in name for part in ("A_log", "dt_bias")) or name.endswith(".D")
        assert (name in still) == (marked or parameter.ndim < 2), name
    assert any("A_log" in name for name in still)
    groups = parameter_groups(model, OptimizerConfig(lr=0.5, weight_decay=0.3))
    assert sorted((g["weight_decay"], g["lr"]) for g in groups) == [(0.0, 0.5), (0.3, 0.5)]
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    embedding = next(n for n, m in model.named_modules() if isinstance(m, nn.Embedding)) + ".weight"
    assert embedding not in still
    assert embedding in no_decay_names(model, decay_embeddings=False)


def test_lr_multipliers_by_pattern() -> None:
    model = small()
    config = OptimizerConfig(lr=0.1, lr_multipliers={"*A_log": 0.5, "*in_proj*": 2.0})
    rates = {n: g["lr"] for g in parameter_groups(model, config) for n in g["names"]}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.05 if "A_log" in name else 0.2 if "in_proj" in name else 0.1), name
    with pytest.raises(ValueError, match=r"lr_multipliers has the pattern 'nothing\*'"):
        parameter_groups(model, OptimizerConfig(lr_multipliers={"nothing*": 2.0}))


def test_frozen_parameters_are_left_out_and_none_raises() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [g["names"] for g in parameter_groups(model, OptimizerConfig())] == [["bias"]]
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, OptimizerConfig())


def test_adamw_settings() -> None:
    config = OptimizerConfig(lr=0.2, betas=(0.8, 0.7), eps=1e-5)
    optimizer = build_optimizer(small(), config)
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    assert optimizer.defaults["eps"] == 1e-5
    assert not optimizer.defaults["fused"]


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [("32-true", True), ("bf16-true", True), ("bf16-mixed", False), ("16-mixed", False)],
)
def test_no_fused_optimizer_under_mixed_precision(
    precision: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning refuses to clip gradients beside a fused optimizer there."""
    asked: list[bool] = []

    def build(model: nn.Module, config: OptimizerConfig, *, allow_fused: bool = True) -> torch.optim.AdamW:
        asked.append(allow_fused)
        return build_optimizer(model, config, allow_fused=allow_fused)

    monkeypatch.setattr("ssm_modal.tasks.base.build_optimizer", build)
    task = LanguageModelling("mamba_lm", OVERRIDES)
    monkeypatch.setattr(task, "_trainer", SimpleNamespace(precision=precision, max_steps=5))
    task.configure_optimizers()
    assert asked == [allowed]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", True), ("bf16-mixed", None), ("16-mixed", None)]
)
def test_fit_with_clipping_on_a_gpu(tmp_path: Path, precision: str, fused: bool | None) -> None:
    task = LanguageModelling("mamba_lm", OVERRIDES)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    run = trainer(
        tmp_path, accelerator="gpu", devices=1, precision=precision, gradient_clip_val=0.5, max_steps=3
    )
    run.fit(task, TinyData())
    assert run.optimizers[0].defaults["fused"] is fused
    assert run.global_step == 3
    for name, parameter in task.named_parameters():
        assert parameter.dtype == torch.float32, f"{name}: the master weights are fp32"
        assert parameter.isfinite().all(), name
    assert any(not torch.equal(before[n], p.detach().cpu()) for n, p in task.named_parameters())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"lr_multipliers": {"x": -1.0}}, "lr_multipliers"),
    ],
)
def test_optimizer_errors(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        OptimizerConfig(**options)


# ---------------------------------------------------------------------- schedules


def test_schedule_values() -> None:
    # 11 steps: 0 ... 10. Warm-up over 2: 1/3, 2/3, then the peak at step 2 and the floor at step 10.
    options: dict[str, Any] = {"warmup_steps": 2, "min_lr": 0.1}
    cosine = schedule_factor(ScheduleConfig("cosine", **options), 1.0, 11)
    assert [cosine(s) for s in (0, 1, 2, 6, 10, 20)] == pytest.approx([1 / 3, 2 / 3, 1, 0.55, 0.1, 0.1])
    assert cosine(4) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    linear = schedule_factor(ScheduleConfig("linear", **options), 1.0, 11)
    assert [linear(s) for s in (2, 4, 6, 10)] == pytest.approx([1, 0.775, 0.55, 0.1])
    constant = schedule_factor(ScheduleConfig("constant", **options), 1.0, 11)
    assert [constant(s) for s in (0, 2, 10)] == pytest.approx([1 / 3, 1, 1])
    wsd = schedule_factor(ScheduleConfig("wsd", decay_fraction=0.4, **options), 1.0, 11)
    # The last 4 of 11 steps decay, from step 7 at the peak to step 10 at the floor.
    assert [wsd(s) for s in (1, 2, 7, 8, 9, 10)] == pytest.approx([2 / 3, 1, 1, 0.7, 0.4, 0.1])


def test_schedule_moves_every_group_by_its_own_rate() -> None:
    config = OptimizerConfig(lr=0.1, lr_multipliers={"*A_log": 0.5})
    optimizer = build_optimizer(small(), config)
    schedule = build_schedule(optimizer, ScheduleConfig("linear", min_lr=0.02), 0.1, 6)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.01, 0.02])


@pytest.mark.parametrize(
    ("options", "steps", "word"),
    [
        ({"warmup_steps": 5}, 5, "warmup_steps is 5, expected fewer than the 5 steps"),
        ({"min_lr": 1.0}, 5, "min_lr is 1.0, expected at most optimizer.lr = 0.1"),
        ({}, -1, "set trainer.max_steps"),
    ],
)
def test_schedule_errors(options: dict[str, Any], steps: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build_schedule(build_optimizer(small(), OptimizerConfig()), ScheduleConfig(**options), 0.1, steps)
    for wrong in (
        {"kind": "cosin"},
        {"warmup_steps": -1},
        {"min_lr": -1.0},
        {"decay_fraction": 0.0},
        {"total_steps": 0},
    ):
        with pytest.raises(ValueError, match=f"schedule.{next(iter(wrong))} is"):
            ScheduleConfig(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- losses and means


def test_token_loss_counts_targets_alone() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 4], [-100, -100, 0]])
    total, count = token_loss(logits, labels)
    rows = logits.log_softmax(-1)
    assert float(total) == pytest.approx(-float(rows[0, 0, 1] + rows[0, 2, 4] + rows[1, 2, 0]))
    assert int(count) == 3
    with pytest.raises(ValueError, match=r"labels has shape \(2, 2\)"):
        token_loss(logits, labels[:, :2])


def test_validation_is_the_mean_over_targets(tmp_path: Path) -> None:
    """Batches of 1, 2 and 3 rows with unequal numbers of targets: not the mean of their means."""
    task, data = LanguageModelling("mamba_lm", OVERRIDES), TinyData(val_batches=3, uneven=True)
    found = trainer(tmp_path).validate(task, data, verbose=False)[0]
    task.eval()
    pairs = [token_loss(task.logits(b), b["labels"]) for b in (data.val_batch(i, 0, 1) for i in range(3))]
    total, count = (sum(float(p[i]) for p in pairs) for i in (0, 1))
    assert found["val/loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    means = sum(float(t / c) for t, c in pairs) / 3
    assert abs(means - total / count) > 1e-4


def test_packed_batch_becomes_sequences_once() -> None:
    task = LanguageModelling("mamba_lm", OVERRIDES).eval()
    ids = torch.randint(VOCAB, (1, 9))
    borders = torch.tensor([0, 4, 9])
    batch = task.transfer_batch_to_device(
        {"ids": ids, "labels": ids, "cu_seqlens": borders}, torch.device("cpu"), 0
    )
    assert set(batch) == {"ids", "labels", "seqs"}
    assert isinstance(batch["seqs"], Sequences)
    assert batch["seqs"].lengths == (4, 5)
    apart = torch.cat([task(ids[:, :4])[0], task(ids[:, 4:])[0]], 1)
    torch.testing.assert_close(task.logits(batch), apart)
    with pytest.raises(ValueError, match="cu_seqlens ends at 8, expected 9"):
        task.transfer_batch_to_device(
            {"ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 8])}, torch.device("cpu"), 0
        )


# ---------------------------------------------------------------------- models and checkpoints


def test_hyper_parameters_are_plain_and_rebuild_the_model(tmp_path: Path) -> None:
    task = LanguageModelling("mamba_lm", OVERRIDES)
    run = trainer(tmp_path)
    run.fit(task, TinyData())
    path = tmp_path / "x.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert (
        saved["hyper_parameters"]["model_config"] == ssm_modal.model_config("mamba_lm", **OVERRIDES).to_dict()
    )
    again = ssm_modal.load_pretrained(path)
    ids = torch.randint(VOCAB, (2, 7))
    task.eval()
    assert torch.equal(again.eval()(ids)[0], task(ids)[0])
    backbone = ssm_modal.load_pretrained(path, part="backbone")
    assert all(torch.equal(v, task.model.backbone.state_dict()[k]) for k, v in backbone.state_dict().items())


def test_init_from(tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = small()
    source.save_pretrained(tmp_path / "source")
    path = str(tmp_path / "source")
    task = LanguageModelling("mamba_lm", OVERRIDES, init_from=path)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    other = {**OVERRIDES, "vocab_size": 23}
    task = LanguageModelling("mamba_lm", other, init_from=path, init_part="backbone")
    for name, value in task.model.backbone.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[name]), name
    with pytest.raises(
        CheckpointError, match=r"source' \(all\) does not fit .*\(11, 8\), expected \(23, 8\)"
    ):
        LanguageModelling("mamba_lm", other, init_from=path)
    half = source.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    task = LanguageModelling("mamba_lm", OVERRIDES, init_from=str(tmp_path / "half"))
    assert {p.dtype for p in task.parameters()} == {torch.float32}, "weights are trained in fp32"


def test_vocabulary_of_the_data_must_fit(tmp_path: Path) -> None:
    data = TinyData()
    data.vocab_size = VOCAB + 1
    with pytest.raises(ValueError, match="vocabulary of 12 ids, but the model's vocab_size is 11"):
        trainer(tmp_path).fit(LanguageModelling("mamba_lm", OVERRIDES), data)


def test_step_must_be_written() -> None:
    with pytest.raises(NotImplementedError, match="TrainingTask must define step"):
        TrainingTask("mamba_lm", OVERRIDES).step({}, "train")


def test_config_differences() -> None:
    there = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": 0}
    assert config_differences(there, {"a": 1, "b": {"c": 2, "d": (1, 2)}, "e": 0}) == []
    assert config_differences(there, {"a": 1, "b": {"c": 3, "d": [1, 2]}, "f": 0}) == [
        "b.c is 2 there and 3 here",
        "e is 0 there and None here",
        "f is None there and 0 here",
    ]


def test_a_checkpoint_older_than_a_field_has_its_default() -> None:
    mixers = ({"type": "mamba"}, {"type": "attention", "n_heads": 2})
    config = ssm_modal.model_config("mamba_lm", **OVERRIDES, mixer=mixers)
    here, old = config.to_dict(), config.to_dict()
    del old["tie_embeddings"], old["backbone"]["norm_eps"], old["backbone"]["mixer"][1]["n_kv_heads"]
    assert architecture_differences(old, here) == []
    del old["backbone"]["mixer"][1]["n_heads"]
    assert len(architecture_differences(old, here)) == 1, "this run's value is not the default"
    task = LanguageModelling("mamba_lm", OVERRIDES)
    plain = task.model_config()
    del plain["backbone"]["norm_eps"]
    task.on_load_checkpoint({"hyper_parameters": {"model_config": plain}})
    plain["backbone"]["norm_eps"] = 0.5
    with pytest.raises(ValueError, match=r"architecture: backbone.norm_eps is 0.5 there and 1e-05 here"):
        task.on_load_checkpoint({"hyper_parameters": {"model_config": plain}})
    del plain["backbone"]["norm_eps"]
    plain["of_tomorrow"] = 1
    with pytest.raises(ValueError, match="of_tomorrow is 1 there and None here"):
        task.on_load_checkpoint({"hyper_parameters": {"model_config": plain}})


def test_reseed_depends_on_seed_and_batch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    task = LanguageModelling("mamba_lm", OVERRIDES)
    task.trainer = trainer(tmp_path)

    def draw(counter: int) -> torch.Tensor:
        torch.rand(3)
        task.reseed(counter)
        return torch.rand(4)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    first = draw(1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    assert not torch.equal(first, draw(1))

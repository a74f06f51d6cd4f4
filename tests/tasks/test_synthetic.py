"""SyntheticTask and the length tests: oracles, streaming, files, memory, and a small training."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from ssm_modal import create_model
from ssm_modal.cli.callbacks import StopOnNonFinite
from ssm_modal.datamodules.synthetic import Setting, SyntheticDataModule
from ssm_modal.tasks.lengths import (
    IGNORE,
    LengthResult,
    count_right,
    evaluate_lengths,
    plot,
    print_table,
    write_results,
)
from ssm_modal.tasks.optimizers import OptimizerConfig
from ssm_modal.tasks.schedules import ScheduleConfig
from ssm_modal.tasks.synthetic import SyntheticTask


class Oracle(nn.Module):
    """Solves induction heads exactly, one segment after another: its state is (answer so far, last token)."""

    def __init__(self, vocab_size: int = 16) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.most = 0  # the most tokens it was given at once
        self.calls: list[tuple[int, int]] = []

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.calls.append(tuple(ids.shape))  # type: ignore[arg-type]
        self.most = max(self.most, ids.numel())
        if state is None:
            state = (torch.full((len(ids),), -1), torch.full((len(ids),), -1))
        answer, last = state
        logits = torch.zeros(*ids.shape, self.vocab_size)
        special = self.vocab_size - 1
        for t in range(ids.shape[1]):
            answer = torch.where((last == special) & (answer < 0), ids[:, t], answer)
            last = ids[:, t]
            logits[torch.arange(len(ids)), t, answer.clamp(min=0)] = 1
        return logits, (answer, last)


class Fixed(nn.Module):
    """Always predicts the token `answer`, and keeps no state."""

    def __init__(self, answer: int, vocab_size: int = 16) -> None:
        super().__init__()
        self.answer, self.vocab_size = answer, vocab_size
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, None]:
        assert state is None
        self.shapes.append(tuple(ids.shape))
        logits = torch.zeros(*ids.shape, self.vocab_size)
        logits[..., self.answer] = 1
        return logits, None


class Broke(nn.Module):
    """Has not enough memory for more than `most` tokens."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.seen = 0

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.seen = ids.shape[1] if state is None else self.seen + ids.shape[1]
        if self.seen > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(*ids.shape, 16), torch.zeros(len(ids))


def test_an_oracle_gets_every_length_right_however_it_is_streamed() -> None:
    data = SyntheticDataModule(lengths=[5, 64, 200], sequences=20, seed=0)
    for segment, in_flight in ((7, 64), (64, 64), (1000, 1000)):
        results = evaluate_lengths(Oracle(), data, segment=segment, tokens_in_flight=in_flight)
        assert [(r.length, r.accuracy, r.whole, r.sequences, r.answers) for r in results] == [
            (5, 1.0, 1.0, 20, 20),
            (64, 1.0, 1.0, 20, 20),
            (200, 1.0, 1.0, 20, 20),
        ]


def test_guessing_comes_to_chance() -> None:
    data = SyntheticDataModule("copying", length=40, lengths=[40], sequences=1500, seed=0)
    (result,) = evaluate_lengths(Fixed(3), data)
    assert result.answers == 1500 * 16
    assert result.accuracy == pytest.approx(data.chance, abs=0.006), "1 / 14; the standard error is 0.0017"
    assert result.whole == 0.0


def test_wrong_and_right_answers_are_counted_one_by_one() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    labels = torch.full_like(ids, IGNORE)
    labels[0, 1], labels[0, 3], labels[1, 2], labels[2, 0] = 3, 3, 3, 2
    for segment in (1, 2, 3, 4, 9):
        got = count_right(Fixed(3), ids, labels, segment=segment)
        assert (got.right, got.whole) == (3, 2)
        # One logit of 1 among 15 of 0: three right, one wrong.
        assert got.loss == pytest.approx(4 * math.log(math.e + 15) - 3, abs=1e-5)


def test_a_model_without_state_takes_each_sequence_whole() -> None:
    model = Fixed(0)
    ids = torch.zeros(2, 10, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = 0
    assert count_right(model, ids, labels, segment=4)[:2] == (2, 2)
    assert model.shapes == [(2, 4), (2, 10)], "seen to carry nothing after the first segment"


def test_tokens_in_flight_are_bounded_at_every_length() -> None:
    model = Oracle()
    data = SyntheticDataModule(lengths=[16, 100, 1000], sequences=9, seed=0)
    evaluate_lengths(model, data, segment=32, tokens_in_flight=64)
    assert model.most == 64
    assert {shape for shape in model.calls if shape[1] == 16} >= {(4, 16)}, "short ones share a batch"
    assert max(length for _, length in model.calls) == 32
    model = Oracle()
    evaluate_lengths(model, data, segment=1000, tokens_in_flight=50)
    assert model.most == 50


def test_a_long_sequence_needs_no_more_memory_than_a_short_one(device: torch.device) -> None:
    """The largest tensor that the model makes is the same at 2^9 and at 2^14 tokens."""
    model = create_model("mamba_lm", vocab_size=16, d_model=16, n_layers=1).to(device)
    largest: list[int] = []

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        largest.extend(x.numel() for x in (*inputs, output) if isinstance(x, Tensor))

    for module in model.modules():
        module.register_forward_hook(watch)
    peaks = []
    for length in (1 << 9, 1 << 14):
        largest.clear()
        data = SyntheticDataModule(lengths=[length], sequences=2, seed=0)
        evaluate_lengths(model, data, segment=256, tokens_in_flight=512)
        peaks.append(max(largest))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("name", ["mamba_lm", "s4d_lm", "transformer_lm"])
def test_streamed_answers_are_the_unstreamed_ones(name: str) -> None:
    torch.manual_seed(3)
    model = create_model(name, vocab_size=16, d_model=32, n_layers=2, embedding_std=0.1).eval()
    data = SyntheticDataModule("selective_copying", length=96, sequences=24, seed=0)
    batch = data.test_batch(0, 0, 24)
    with torch.inference_mode():
        predicted = model(batch["ids"])[0].argmax(-1)
    asked = batch["labels"] != IGNORE
    right = int((predicted == batch["labels"])[asked].sum())
    whole = int(((predicted == batch["labels"]) | ~asked).all(1).sum())
    # Labels that the untrained model gets right about half the time, so that every position counts.
    torch.manual_seed(0)
    mixed = torch.where(torch.rand(predicted.shape) < 0.5, predicted, (predicted + 1) % 16)
    labels = torch.where(asked, mixed, IGNORE)
    expected = int((predicted == labels)[asked].sum())
    assert 0 < expected < int(asked.sum())
    with torch.inference_mode():
        loss = nn.functional.cross_entropy(
            model(batch["ids"])[0][asked], labels[asked], reduction="sum"
        ).item()
        for segment in (96, 40, 13):
            assert count_right(model, batch["ids"], batch["labels"], segment=segment)[:2] == (right, whole)
            got = count_right(model, batch["ids"], labels, segment=segment)
            assert got.right == expected
            assert got.loss == pytest.approx(loss, rel=1e-5), "the state is carried"
        # The labels are on the last 16 positions: a segment that started afresh there would differ.
        alone = count_right(model, batch["ids"][:, 80:], labels[:, 80:])
        assert alone.loss != pytest.approx(loss, rel=3e-4)


def test_lengths_too_long_are_reported_and_the_others_tested() -> None:
    data = SyntheticDataModule(lengths=[16, 64, 256], sequences=4, seed=0)
    results = evaluate_lengths(Fixed(1), data, max_length=64)
    assert [(r.accuracy is None, r.note, r.sequences) for r in results] == [
        (False, "", 4),
        (False, "", 4),
        (True, "above max_length", 0),
    ]
    results = evaluate_lengths(Broke(64), data, segment=32)
    assert [r.note for r in results] == ["", "", "out of memory"]
    assert results[2].accuracy is None


def test_other_errors_of_a_model_are_not_swallowed_and_its_mode_is_put_back() -> None:
    class Bad(nn.Module):
        def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            raise RuntimeError("shape mismatch")

    model = Bad()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        evaluate_lengths(model, SyntheticDataModule(sequences=2, seed=0))
    assert model.training


def test_processes_share_the_sequences_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    data = SyntheticDataModule(lengths=[32], sequences=11, seed=0)
    parts = [evaluate_lengths(Fixed(3), data, rank=rank, world=3)[0] for rank in range(3)]
    (whole,) = evaluate_lengths(Fixed(3), data)
    assert [p.sequences for p in parts] == [3, 4, 4]
    right = sum(p.accuracy * p.answers for p in parts if p.accuracy is not None)
    assert whole.accuracy is not None
    assert right == pytest.approx(whole.accuracy * whole.answers)


RESULTS = [
    LengthResult(64, None, 1.0, 1.0, 1024, 1024, 0.5),
    LengthResult(256, None, 0.9990234375, 0.9990234375, 1024, 1024, 1.25),
    LengthResult(16384, None, None, None, 0, 0, 0.0, "above max_length"),
]


def test_the_files_of_the_results(tmp_path: Path) -> None:
    write_results(tmp_path / "run", RESULTS, trained_length=256, chance=1 / 15, title="x")
    text = (tmp_path / "run" / "lengths.csv").read_text()
    assert text == "length,accuracy,sequences\n64,1.000000,1024\n256,0.999023,1024\n16384,n/a,0\n"
    with open(tmp_path / "run" / "lengths_details.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["note"] for r in rows] == ["", "", "above max_length"]
    assert rows[1]["whole_sequences"] == "0.999023"
    assert float(rows[0]["chance"]) == pytest.approx(1 / 15, rel=1e-5)
    assert rows[0]["pairs"] == ""
    assert (tmp_path / "run" / "lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "lengths.csv",
        "lengths.png",
        "lengths_details.csv",
    ]


def test_the_plot_shows_every_number_of_pairs() -> None:
    mixed = [LengthResult(256, pairs, 0.5, 0.1, 10, 10, 0.0) for pairs in (16, 64)]
    assert plot(mixed, trained_length=256, chance=0.1) != plot(mixed[:1], trained_length=256, chance=0.1)


def test_the_table_says_what_was_not_tested(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(RESULTS, "induction")
    printed = capsys.readouterr().out
    assert "16,384" in printed
    assert "n/a (above max_length)" in printed
    assert "99.90 %" in printed


# ---------------------------------------------------------------------- the task


def small(tmp_path: Path, **options: Any) -> tuple[SyntheticTask, SyntheticDataModule, Trainer]:
    task = SyntheticTask(
        "mamba_lm",
        {"vocab_size": 16, "d_model": 32, "n_layers": 2, "d_state": 8},
        OptimizerConfig(lr=5e-3, weight_decay=0.0),
        ScheduleConfig(kind="constant", warmup_steps=5),
        **{k: options.pop(k) for k in ("stop_at", "stop_checks", "max_length", "segment") if k in options},
    )
    data = SyntheticDataModule(
        length=16, batch_size=64, lengths=[8, 16], sequences=256, val_sequences=128, seed=0, **options
    )
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=400,
        val_check_interval=25,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    return task, data, trainer


def test_a_small_training_learns_stops_early_and_is_tested(tmp_path: Path) -> None:
    task, data, trainer = small(
        tmp_path, stop_at=0.99, stop_checks=2, val_lengths=[24], train_lengths=[8, 16]
    )
    trainer.fit(task, datamodule=data)
    assert trainer.global_step < 400, "stop_at ended the training"
    assert trainer.global_step % 25 == 0
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] >= 0.99
    assert metrics["val/accuracy_24"] >= 0.99
    assert metrics["val/accuracy_min"] == min(metrics["val/accuracy"], metrics["val/accuracy_24"])
    assert metrics["val/loss_max"] == max(metrics["val/loss"], metrics["val/loss_24"])
    made = data.val_batch(1)
    logits = task.model(made["ids"])[0][:, -1]
    expected = nn.functional.cross_entropy(logits, made["labels"][:, -1])
    assert metrics["val/loss_24"] == pytest.approx(expected.item(), rel=1e-4)
    (tested,) = trainer.test(task, datamodule=data, verbose=False)
    with open(tmp_path / "lengths.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["length"]), int(r["sequences"])) for r in rows] == [(8, 256), (16, 256)]
    assert float(rows[1]["accuracy"]) >= 0.98
    assert tested["test/accuracy_16"] == pytest.approx(float(rows[1]["accuracy"]), abs=1e-6)
    again = evaluate_lengths(task.model, data)
    assert [r.accuracy for r in again] == [r.accuracy for r in task.results]


def test_what_is_kept_stays_and_the_logged_rate_is_that_of_the_rest(tmp_path: Path) -> None:
    _, data, trainer = small(tmp_path)
    task = SyntheticTask(
        "mamba_lm",
        {"vocab_size": 16, "d_model": 8, "n_layers": 1, "d_state": 1},
        OptimizerConfig(lr=1e-3, lr_multipliers={"*.embedding.weight": 0.0, "*.A_log": 10.0}),
        ScheduleConfig(kind="linear", total_steps=11),
    )
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    trainer.fit_loop.epoch_loop.max_steps = trainer.log_every_n_steps = 5
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 5
    changed = {name for name, p in task.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before) - {"model.embedding.weight"}
    assert trainer.callback_metrics["lr"] == pytest.approx(1e-3 * (1 - 4 / 10)), "step 4 of 0 ... 10"


def test_only_what_is_written_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven steps the third and the sixth, where every third is written."""
    task, data, trainer = small(tmp_path)
    trainer.fit_loop.epoch_loop.max_steps, trainer.log_every_n_steps = 7, 3
    seen: list[tuple[int, str]] = []
    log = SyntheticTask.log

    def record(self: SyntheticTask, name: str, *args: object, **kwargs: object) -> None:
        if not name.startswith(("val", "test")):
            seen.append((self.trainer.global_step, name))
        log(self, name, *args, **kwargs)

    monkeypatch.setattr(SyntheticTask, "log", record)
    trainer.callbacks.append(StopOnNonFinite())
    trainer.fit(task, datamodule=data)
    names = ("lr", "train/loss", "grad_norm")
    assert sorted(seen) == sorted((step, name) for step in (2, 5) for name in names)


def test_the_loss_is_the_models_loss_at_labelled_positions(tmp_path: Path) -> None:
    task, data, trainer = small(tmp_path)
    task.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    copies = SyntheticDataModule("copying", length=40, batch_size=3, seed=0)
    batch = task.transfer_batch_to_device(copies.train_batch(0), torch.device("cpu"), 0)
    out = task.step(batch, "train")
    logits = task.model(batch["ids"])[0]
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert out.count == 48
    torch.testing.assert_close(out.loss, expected)
    gradients = torch.autograd.grad(out.loss, list(task.model.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(expected, list(task.model.parameters()))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


class Recorder(SyntheticTask):
    """A task whose validations come out as told."""

    script: list[float]

    def step(self, batch: Mapping[str, Any], stage: str) -> Any:
        out = super().step(batch, stage)
        if stage == "val":
            count = torch.tensor(1.0)
            return type(out)(
                out.loss, out.count, {"accuracy": (torch.tensor(self.script[0], dtype=torch.float64), count)}
            )
        return out

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.script.pop(0)


def test_stop_at_wants_its_checks_one_after_the_other(tmp_path: Path) -> None:
    _, data, trainer = small(tmp_path)
    task = Recorder(
        "mamba_lm",
        {"vocab_size": 16, "d_model": 8, "n_layers": 1, "d_state": 1},
        schedule=ScheduleConfig(kind="constant"),
        stop_at=0.9,
        stop_checks=2,
    )
    task.script = [0.95, 0.5, 0.95, 0.9, 1.0]
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 100, "the third and the fourth check"
    saved: dict[str, Any] = {}
    task.on_save_checkpoint(saved)
    other = Recorder("mamba_lm", {"vocab_size": 16, "d_model": 8, "n_layers": 1, "d_state": 1})
    other.on_load_checkpoint(saved)
    assert other._checks_passed == 2


def test_predict_gives_a_token_at_labelled_positions_alone(tmp_path: Path) -> None:
    task, data, trainer = small(tmp_path)
    predictions: Any = trainer.predict(task, datamodule=data)
    assert sum(len(p["ids"]) for p in predictions) == 128
    for p in predictions:
        assert torch.equal(p["predicted"] != IGNORE, p["labels"] != IGNORE)
        with torch.inference_mode():
            logits = task.model(p["ids"])[0]
        assert torch.equal(p["predicted"][:, -1], logits[:, -1].argmax(-1))


def test_mqar_settings_get_a_row_each(tmp_path: Path) -> None:
    task = SyntheticTask("mamba_lm", {"vocab_size": 64, "d_model": 8, "n_layers": 1, "d_state": 2})
    settings = [Setting(32, pairs=2, sequences=6), Setting(32, pairs=8, sequences=4)]
    data = SyntheticDataModule("mqar", length=32, vocab_size=64, pairs=8, test_settings=settings, seed=0)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    (tested,) = trainer.test(task, datamodule=data, verbose=False)
    assert {"test/accuracy_32_2", "test/accuracy_32_8"} <= set(tested)
    with open(tmp_path / "lengths_details.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["pairs"], r["sequences"], r["answers"]) for r in rows] == [("2", "6", "12"), ("8", "4", "32")]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_at": 1.5}, r"stop_at is 1\.5"),
        ({"stop_checks": 0}, "stop_checks is 0"),
        ({"segment": 0}, "segment is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SyntheticTask("mamba_lm", {"d_model": 8, "n_layers": 1}, **options)


def test_a_vocabulary_too_small_is_named(tmp_path: Path) -> None:
    task = SyntheticTask("mamba_lm", {"vocab_size": 8, "d_model": 8, "n_layers": 1})
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="vocabulary of 16 ids, but the model's vocab_size is 8"):
        trainer.test(task, datamodule=SyntheticDataModule(sequences=2, seed=0), verbose=False)


def test_data_without_lengths_is_named(tmp_path: Path) -> None:
    task = SyntheticTask("mamba_lm", {"vocab_size": 16, "d_model": 8, "n_layers": 1})
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(
        TypeError, match="expected a data module with length, chance, test_settings, test_batch"
    ):
        trainer.test(task, dataloaders=[{"setting": torch.tensor(0)}], verbose=False)
    with pytest.raises(ValueError, match="segment is 0"):
        evaluate_lengths(Fixed(0), SyntheticDataModule(seed=0), segment=0)

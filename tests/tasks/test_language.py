"""Language modelling: the streamed loss, bits a byte, predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from ssm_modal.layers import collect_routing, load_balancing_loss
from ssm_modal.tasks import LanguageModelling
from tests.tasks.test_base import trainer
from tests.tasks.tiny import OVERRIDES, TinyData


class WithBytes(TinyData):
    def bytes_per_token(self, split: str) -> float:
        return {"validation": 2.0, "test": 4.0}[split]


def whole_text_loss(task: LanguageModelling, ids: torch.Tensor) -> float:
    task.eval()
    with torch.no_grad():
        logits = task(ids[None, :-1])[0]
    return float(torch.nn.functional.cross_entropy(logits[0], ids[1:]))


@pytest.mark.parametrize("segment", [7, 49, 1000])
def test_streamed_loss_is_the_loss_of_the_whole_text(tmp_path: Path, segment: int) -> None:
    task = LanguageModelling("mamba_lm", OVERRIDES, stream="validate", stream_segment=segment)
    data = WithBytes()
    found = trainer(tmp_path).validate(task, data, verbose=False)[0]
    expected = whole_text_loss(task, data.stream("validation"))
    assert found["val/stream_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["val/stream_bits_per_byte"] == pytest.approx(expected / math.log(2) / 2, rel=1e-5)
    assert found["val/bits_per_byte"] == pytest.approx(found["val/loss"] / math.log(2) / 2, rel=1e-6)


def test_streamed_loss_at_test_alone(tmp_path: Path) -> None:
    task, data = LanguageModelling("mamba_lm", OVERRIDES, stream="test"), WithBytes()
    assert "val/stream_loss" not in trainer(tmp_path).validate(task, data, verbose=False)[0]
    found = trainer(tmp_path).test(task, data, verbose=False)[0]
    assert found["test/stream_loss"] == pytest.approx(whole_text_loss(task, data.stream("test")), rel=1e-5)
    assert found["test/bits_per_byte"] == pytest.approx(found["test/loss"] / math.log(2) / 4, rel=1e-6)


def test_no_bytes_without_the_data_saying_so(tmp_path: Path) -> None:
    found = trainer(tmp_path).validate(LanguageModelling("mamba_lm", OVERRIDES), TinyData(), verbose=False)[0]
    assert set(found) == {"val/loss", "val/perplexity"}


def test_stream_without_a_stream_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TinyData, "stream")
    with pytest.raises(ValueError, match="stream is 'test', but TinyData has no stream"):
        trainer(tmp_path).test(LanguageModelling("mamba_lm", OVERRIDES, stream="test"), TinyData())
    with pytest.raises(ValueError, match="stream is 'tset'"):
        LanguageModelling("mamba_lm", OVERRIDES, stream="tset")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream_segment is 0"):
        LanguageModelling("mamba_lm", OVERRIDES, stream_segment=0)


def test_predictions_are_nats_a_target() -> None:
    task, data = LanguageModelling("mamba_lm", OVERRIDES).eval(), TinyData(uneven=True)
    batch = data.val_batch(1, 0, 1)
    out = task.predict_step(batch, 0)
    logs = task.logits(batch).log_softmax(-1)
    for row, column in ((0, 11), (1, 11)):
        target = int(batch["labels"][row, column])
        assert float(out["nats"][row, column]) == pytest.approx(-float(logs[row, column, target]), rel=1e-5)
    assert bool((out["nats"][batch["labels"] == -100] == 0).all())


EXPERTS = {
    "vocab_size": 11,
    "d_model": 8,
    "n_layers": 2,
    "n_heads": 2,
    "d_state": 4,
    "aux_loss_coef": 0.5,
    "mlp.d_hidden": 16,
}


@pytest.mark.parametrize("segment", [None, 5])
def test_the_experts_balance_is_trained_but_not_counted(tmp_path: Path, segment: int | None) -> None:
    """One step's gradients: those of the mean loss plus aux_loss_coef times the balance."""
    torch.manual_seed(0)
    task, data = LanguageModelling("jamba_lm", EXPERTS, segment=segment), TinyData()
    twin = LanguageModelling("jamba_lm", EXPERTS)
    twin.load_state_dict(task.state_dict())
    seen: dict[str, torch.Tensor] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
            seen.update({n: p.grad.clone() for n, p in task.named_parameters()})

    fit = trainer(tmp_path, max_steps=1, callbacks=[Watch()], log_every_n_steps=1)
    fit.fit(task, data)
    logged = fit.logged_metrics
    batch = data.train_batch(0, 0, 1)
    twin.train()
    with collect_routing(twin) as routing:
        logits, _ = twin(batch["ids"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    balance = load_balancing_loss(routing)
    assert float(logged["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(logged["train/load_balancing_loss"]) == pytest.approx(balance.item(), rel=1e-5)
    (loss + 0.5 * balance).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=2e-4, atol=2e-6)

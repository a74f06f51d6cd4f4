"""Fine-tuning a loaded model with LoRA: only the adapter learns and is saved; a run goes on, and is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.checkpoints.adapters import load_adapter
from ssm_modal.cli.main import main
from ssm_modal.errors import CheckpointError
from ssm_modal.tokenizers import ByteTokenizer

pytest.importorskip("peft")
TEXT = "It was the best of times, it was the worst of times. "


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ssm_modal.create_model("mamba_lm", vocab_size=256, d_model=64, n_layers=1)
    model.save_pretrained(tmp_path / "base")
    ByteTokenizer().save(tmp_path / "base" / "tokenizer.json")
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(TEXT * 60)
    return tmp_path


def fit(places: Path, *more: str) -> int:
    settings = {
        "run_dir": places / "run",
        "test_after_fit": "false",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 6,
        "trainer.val_check_interval": 3,
        "trainer.limit_val_batches": 1,
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": 3,
        "model.pretrained": places / "base",
        "model.optimizer.lr": 0.02,
        "model.schedule.warmup_steps": 0,
        "model.schedule.kind": "constant",
        "data.path": places / "texts",
        "data.tokenizer": places / "base" / "tokenizer.json",
        "data.length": 48,
        "data.batch_size": 4,
    }
    line = [f"--{key}={value}" for key, value in settings.items()]
    return main(["fit", "--config", "text/lora.yaml", *line, *more])


def loss(model: Any) -> float:
    ids = torch.tensor([list((TEXT * 3).encode())])
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:]))


def test_only_the_adapter_learns_and_is_saved(places: Path, capsys: Any) -> None:
    assert fit(places) == 0, capsys.readouterr().err
    base: Any = ssm_modal.load_pretrained(places / "base")
    start = loss(base)
    saved = torch.load(places / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert all("lora_" in key for key in saved["state_dict"])
    assert saved["hyper_parameters"]["lora"]["rank"] == 16
    losses = []
    # The folder as peft has it, and the checkpoint.
    for place in (places / "run" / "adapter", places / "run" / "checkpoints" / "last.ckpt"):
        model: Any = ssm_modal.load_pretrained(places / "base")
        load_adapter(model, place)
        for key, tensor in base.state_dict().items():
            own = key if key in model.state_dict() else key.replace("proj.weight", "proj.base_layer.weight")
            assert torch.equal(model.state_dict()[own], tensor)
        losses.append(loss(model))
    assert losses[0] == losses[1] < start - 0.2
    with pytest.raises(
        CheckpointError, match=r"holds an adapter alone; load the model that it is for, '.*base'"
    ):
        ssm_modal.load_pretrained(places / "run")
    # The command line takes it.
    (places / "text.txt").write_text(TEXT * 3)
    line = ["evaluate", "--device", "cpu", "--model", "base", "--adapter", "run/adapter", "text.txt"]
    assert main(line) == 0
    nats = float(capsys.readouterr().out.rsplit(" nats a token", 1)[0].rsplit(" ", 1)[1])
    assert math.isclose(nats, losses[0], abs_tol=2e-4)


def test_a_run_goes_on_where_it_stopped(places: Path, capsys: Any) -> None:
    assert fit(places) == 0, capsys.readouterr().err
    whole = torch.load(places / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert fit(places, f"--run_dir={places / 'two'}", "--trainer.max_steps=3") == 0
    assert fit(places, f"--run_dir={places / 'two'}", "--ckpt_path=last") == 0, capsys.readouterr().err
    again = torch.load(places / "two" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert (places / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_packed_weights_are_tuned_too(places: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    assert fit(places, "--model.quantize=int4", "--trainer.max_steps=2") == 0, capsys.readouterr().err
    model: Any = ssm_modal.load_pretrained(places / "base", quantize="int4")
    before = loss(model)
    load_adapter(model, places / "run" / "adapter")
    assert loss(model) != before

"""Saving and loading: the package's own folders, training runs' checkpoints, and everything that can be
wrong."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ssm_modal
from ssm_modal.backbone import Backbone
from ssm_modal.errors import CheckpointError
from ssm_modal.models import CausalLM

IDS = torch.tensor([[1, 5, 2, 7, 0]])


def model(**more: Any) -> CausalLM:
    made = ssm_modal.create_model("mamba_lm", **{"vocab_size": 8, "d_model": 16, "n_layers": 2, **more})
    assert isinstance(made, CausalLM)
    return made


def write_ckpt(path: Path, of: CausalLM, **more: Any) -> None:
    """A checkpoint as Lightning writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "epoch": 3,
        "state_dict": {f"model.{k}": v for k, v in of.state_dict().items()},
        "hyper_parameters": {"model": "mamba_lm", "model_config": of.config.to_dict()},
        **more,
    }
    torch.save(data, path)


@pytest.mark.parametrize("name", ["mamba_lm", "s4d_lm", "transformer_lm", "hybrid_lm"])
def test_a_model_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    saved = ssm_modal.create_model(
        name, vocab_size=8, d_model=16, n_layers=2, tie_embeddings=name != "s4d_lm"
    )
    saved.save_pretrained(tmp_path / "new" / "folder")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loaded = ssm_modal.load_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
    assert loaded.config == saved.config
    assert not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    for (n, a), (m, b) in zip(saved.named_parameters(), loaded.named_parameters()):
        assert n == m
        assert torch.equal(a, b)
        assert getattr(a, "_no_weight_decay", False) == getattr(b, "_no_weight_decay", False), n
    with torch.no_grad():
        assert torch.equal(saved.eval()(IDS)[0], loaded(IDS)[0])
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "embedding.weight" in names
    assert not any(n.startswith("head") for n in names)


def test_the_backbone_alone(tmp_path: Path) -> None:
    saved = model().eval()
    saved.save_pretrained(tmp_path)
    backbone = ssm_modal.load_pretrained(tmp_path, part="backbone")
    assert type(backbone) is Backbone
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        assert torch.equal(backbone(x)[0], saved.backbone(x)[0])
    with pytest.raises(ValueError, match=r"part is 'head', expected None or 'backbone'"):
        ssm_modal.load_pretrained(tmp_path, part="head")  # type: ignore[call-overload]


def test_dtypes(tmp_path: Path) -> None:
    model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = ssm_modal.load_pretrained(tmp_path / "half")
    wide = {n.rsplit(".", 1)[-1] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias"}
    full = ssm_modal.load_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    model().save_pretrained(tmp_path / "full")
    cast = ssm_modal.load_pretrained(tmp_path / "full", device="cpu", dtype=torch.bfloat16)
    assert {n.rsplit(".", 1)[-1] for n, p in cast.named_parameters() if p.dtype == torch.float32} == wide


def test_a_run_s_checkpoint_and_folder(tmp_path: Path) -> None:
    last, best = model(), model()
    write_ckpt(tmp_path / "run" / "checkpoints" / "last.ckpt", last)
    assert same(ssm_modal.load_pretrained(tmp_path / "run" / "checkpoints" / "last.ckpt"), last)
    assert same(ssm_modal.load_pretrained(tmp_path / "run"), last)
    write_ckpt(tmp_path / "run" / "checkpoints" / "best-step=10.ckpt", best)
    os.utime(tmp_path / "run" / "checkpoints" / "best-step=10.ckpt", (1, 1))  # older than the last
    assert same(ssm_modal.load_pretrained(tmp_path / "run"), best)
    assert same(ssm_modal.load_pretrained(tmp_path / "run" / "checkpoints"), best)
    backbone = ssm_modal.load_pretrained(tmp_path / "run", part="backbone")
    assert same(backbone, best.backbone)
    compiled = {"state_dict": {f"model._orig_mod.{k}": v for k, v in best.state_dict().items()}}
    write_ckpt(tmp_path / "compiled.ckpt", best, **compiled)
    assert same(ssm_modal.load_pretrained(tmp_path / "compiled.ckpt"), best)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_loaded_model_outlives_its_file(tmp_path: Path) -> None:
    saved = model()
    write_ckpt(tmp_path / "last.ckpt", saved)
    loaded = ssm_modal.load_pretrained(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes(b"\0" * (tmp_path / "last.ckpt").stat().st_size)
    assert same(loaded, saved)


# ---------------------------------------------------------------- what can be wrong


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a full disk: no file may grow beyond `size` bytes (Python ignores the signal, the write
    fails)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 4000])
def test_a_full_disk_leaves_the_old_files(room: int, tmp_path: Path) -> None:
    old = model()
    old.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with file_size_limit(room), pytest.raises(Exception, match=r"(?i)file too large|os error 27"):
        model(d_model=32).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert same(ssm_modal.load_pretrained(tmp_path), old)


def test_a_failing_config_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file fails after the first was written whole: neither is replaced."""
    old = model()
    old.save_pretrained(tmp_path)

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left"):
        model().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(ssm_modal.load_pretrained(tmp_path), old)


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"is a file, expected a folder"):
        model().save_pretrained(tmp_path / "here")


def test_weights_of_another_architecture_are_listed(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["config"]["backbone"]["n_layers"] = 3
    document["config"]["backbone"]["mixer"]["d_state"] = 4
    document["config"]["tie_embeddings"] = False
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        ssm_modal.load_pretrained(tmp_path)
    text = str(caught.value)
    assert "does not fit CausalLM" in text
    assert "missing: backbone.layers.2.mixer.A_log" in text
    assert text.count("backbone.layers.2.") == len(
        [k for k in load_file(tmp_path / "model.safetensors") if ".1." in k]
    )
    assert "of another shape: backbone.layers.0.mixer.A_log (32, 16), expected (32, 4)" in text
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: extra"):
        ssm_modal.load_pretrained(tmp_path)
    save_file({f"extra{i:02}": torch.zeros(1) for i in range(20)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: extra00, .*, extra15 and 4 more"):
        ssm_modal.load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -10])
def test_a_truncated_weights_file_is_named(size: int, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read; it may be cut short"):
        ssm_modal.load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_a_truncated_ckpt_is_named(size: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_ckpt(path, model())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read; it may be cut short"):
        ssm_modal.load_pretrained(path)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def test_a_ckpt_never_runs_code(tmp_path: Path) -> None:
    write_ckpt(tmp_path / "last.ckpt", model(), trap=Trap())
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        ssm_modal.load_pretrained(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hyper_parameters": {}}, "no model_config among its hyper_parameters"),
        ({"hyper_parameters": None}, "no checkpoint of a training run"),
        ({"state_dict": {}}, "does not fit CausalLM; missing: backbone.layers.0.mixer.A_log"),
    ],
)
def test_a_ckpt_of_something_else_is_named(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_ckpt(tmp_path / "last.ckpt", model(), **more)
    with pytest.raises(CheckpointError, match=message):
        ssm_modal.load_pretrained(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json cannot be read"),
        ('{"model_type": "gpt2"}', r"unknown model_type 'gpt2'; Valid: falcon_mamba, jamba, mamba"),
        ("[1]", r"config\.json holds a list, expected a mapping"),
        ("{}", "no config of a model known here: it has neither 'format'"),
        ('{"format": "ssm_modal", "format_version": 9}', "format_version 9, expected 1"),
        ('{"format": "ssm_modal", "format_version": 1}', "no model config under the key 'config'"),
        (
            '{"format": "ssm_modal", "format_version": 1, "config": {"type": "causal_lmm"}}',
            "unknown type 'causal_lmm'; did you mean 'causal_lm'",
        ),
    ],
)
def test_a_wrong_config_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ssm_modal.load_pretrained(tmp_path)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing-here does not exist"):
        ssm_modal.load_pretrained(tmp_path / "nothing-here")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint: config.json and model.safetensors or .* missing.*notes"
    ):
        ssm_modal.load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.ckpt file"):
        ssm_modal.load_pretrained(tmp_path / "notes.txt")


def test_a_repository_id_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    saved = model()
    saved.save_pretrained(tmp_path)
    asked: list[Any] = []

    def fetched(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert same(ssm_modal.load_pretrained("someone/some-model"), saved)
    (repo, options) = asked.pop()
    assert repo == "someone/some-model"
    assert not asked
    wanted = {"config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"}
    assert wanted < set(options["allow_patterns"])
    assert not any("bin" in pattern for pattern in options["allow_patterns"])
    # Without safetensors the files of torch are fetched too.
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "there")

    def in_two_steps(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        if "pytorch_model*.bin" in options["allow_patterns"]:
            (tmp_path / "there").rename(tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", in_two_steps)
    assert same(ssm_modal.load_pretrained("someone/some-model"), saved)
    assert len(asked) == 2

    def offline(repo: str, **options: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"someone/some-model is no local path, and fetching .*: no network"
    ):
        ssm_modal.load_pretrained("someone/some-model")


def test_the_saved_config_reads_as_plain_json(tmp_path: Path) -> None:
    saved = model()
    saved.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document == {"format": "ssm_modal", "format_version": 1, "config": saved.config.to_dict()}
    assert document["config"]["backbone"]["mixer"]["type"] == "mamba"

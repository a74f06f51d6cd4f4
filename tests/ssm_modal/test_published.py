"""Published checkpoints: sizes, layouts of files, what can be wrong with them, saving, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ssm_modal
from ssm_modal.checkpoints import loading, room
from ssm_modal.cli.main import main
from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.models import CausalLM, model_config
from ssm_modal.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from tests.ssm_modal.published import VOCAB, edit_json, their_logits, theirs
from tests.tolerances import OUTPUT, assert_close

pytest.importorskip("transformers")
IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS)[0]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote, in shards."""
    folder = tmp_path_factory.mktemp("jamba")
    theirs("jamba", {}).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    folder = tmp_path / "mamba"
    theirs("mamba", SMALL).save_pretrained(folder)
    return folder


def copy(folder: Path, target: Path) -> None:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


# ---------------------------------------------------------------- architectures

# Parameters of the published checkpoints; of Falcon-Mamba and Jamba, of transformers' model of their
# config.json.
COUNTS = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    "falcon_mamba_7b": 7_272_665_088,
    "jamba_v0_1": 51_570_323_328,
    "jamba_1_5_mini": 51_570_323_328,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = ssm_modal.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "kind", "keys"),
    [
        ("mamba_130m", "Mamba", {"hidden_size": 768, "num_hidden_layers": 24}),
        ("mamba_2_8b", "Mamba", {"hidden_size": 2560, "num_hidden_layers": 64}),
        (
            "falcon_mamba_7b",
            "FalconMamba",
            {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024, "tie_word_embeddings": False},
        ),
        ("jamba_v0_1", "Jamba", {}),
    ],
)
def test_the_registered_sizes_are_transformers_too(name: str, kind: str, keys: dict[str, Any]) -> None:
    """Names and shapes of every tensor, on meta."""
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")(**keys)
        want = getattr(transformers, f"{kind}ForCausalLM")(config).state_dict()
        model = ssm_modal.create_model(name)
    assert isinstance(model, CausalLM)
    family = loading.family_of_document({"model_type": config.model_type}, "here")
    parts = family.parts(model.config, [k for k in want if "gate_up_proj" in k])
    state = model.state_dict()
    got = {p.key: state[p.name][p.region].shape for p in parts}
    assert got == {k: t.shape for k, t in want.items() if k in got}
    assert want.keys() - got.keys() == ({"lm_head.weight"} if model.config.tie_embeddings else set())
    assert {p.name for p in parts} == state.keys()


def test_falcon_mamba_ignores_a_wrong_expand(tmp_path: Path) -> None:
    there = theirs("falcon_mamba", SMALL)
    there.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", expand=16, intermediate_size=32)
    ours = ssm_modal.load_pretrained(tmp_path)
    assert ours.config.backbone.mixer.expand == 2
    assert_close(logits(ours), their_logits(there, IDS), OUTPUT[torch.float32])


# ---------------------------------------------------------------- layouts


def test_shards_stacked_experts_and_torch_files_are_read_alike(jamba: Path, tmp_path: Path) -> None:
    ours = ssm_modal.load_pretrained(jamba)
    there = theirs("jamba", {})
    (tmp_path / "config.json").write_text((jamba / "config.json").read_text())
    stacked = {k: v.contiguous() for k, v in there.state_dict().items()}
    assert any(k.endswith("experts.gate_up_proj") for k in stacked)
    save_file(stacked, tmp_path / "model.safetensors")
    assert same(ssm_modal.load_pretrained(tmp_path), ours)
    (tmp_path / "model.safetensors").unlink()
    torch.save(stacked, tmp_path / "pytorch_model.bin")
    assert same(ssm_modal.load_pretrained(tmp_path), ours)


def test_the_norms_of_b_and_c_are_not_exchanged(jamba: Path) -> None:
    """Logits do not tell: along the diagonal recurrence their weights meet in one product."""
    mixer = ssm_modal.load_pretrained(jamba).backbone.layers[0].mixer
    there = theirs("jamba", {}).model.layers[0].mamba
    assert torch.equal(mixer.B_norm.weight, there.b_layernorm.weight)
    assert torch.equal(mixer.C_norm.weight, there.c_layernorm.weight)


def test_state_spaces_both_ways(mamba: Path, tmp_path: Path) -> None:
    ours = ssm_modal.load_pretrained(mamba)
    ssm_modal.save_pretrained(ours, tmp_path / "ss", format="state_spaces")
    tensors = torch.load(tmp_path / "ss" / "pytorch_model.bin", weights_only=True)
    per_layer = "A_log D conv1d.bias conv1d.weight dt_proj.bias dt_proj.weight in_proj.weight out_proj.weight"
    names = [*(f"mixer.{n}" for n in (*per_layer.split(), "x_proj.weight")), "norm.weight"]
    assert tensors.keys() == {
        "backbone.embedding.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
        *(f"backbone.layers.{i}.{n}" for i in range(2) for n in names),
    }
    document = json.loads((tmp_path / "ss" / "config.json").read_text())
    assert (document["d_model"], document["n_layer"], document["vocab_size"]) == (16, 2, VOCAB)
    assert same(ssm_modal.load_pretrained(tmp_path / "ss"), ours)
    # As the authors wrote them: few keys, and a vocabulary padded to a multiple of 8.
    padded = {k: torch.cat([v, v.new_zeros(3, 16)]) if v.shape[0] == VOCAB else v for k, v in tensors.items()}
    torch.save(padded, tmp_path / "ss" / "pytorch_model.bin")
    old = {"d_model": 16, "n_layer": 2, "vocab_size": VOCAB, "ssm_cfg": {"d_state": 4}, "rms_norm": True}
    (tmp_path / "ss" / "config.json").write_text(json.dumps(old))
    loaded = ssm_modal.load_pretrained(tmp_path / "ss")
    assert loaded.config.pad_vocab_multiple == 8
    assert torch.equal(logits(loaded), logits(ours))


def test_the_dtype_is_the_config_s_the_embedding_s_or_the_caller_s(mamba: Path) -> None:
    edit_json(mamba / "config.json", dtype="bfloat16")
    half = ssm_modal.load_pretrained(mamba)
    wide = {n.rsplit(".", 1)[-1] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias"}
    assert half.embedding.weight.dtype == torch.bfloat16
    exact = load_file(mamba / "model.safetensors")["backbone.layers.0.mixer.A_log"]
    assert torch.equal(half.backbone.layers[0].mixer.A_log, exact), "went through bf16"
    edit_json(mamba / "config.json", dtype=None, torch_dtype=None)
    assert {p.dtype for p in ssm_modal.load_pretrained(mamba).parameters()} == {torch.float32}
    assert {p.dtype for p in ssm_modal.load_pretrained(mamba, dtype=torch.float64).parameters()} == {
        torch.float64
    }


def test_the_backbone_alone(mamba: Path) -> None:
    backbone = ssm_modal.load_pretrained(mamba, part="backbone")
    assert same(backbone, ssm_modal.load_pretrained(mamba).backbone)


def test_a_tied_head_in_the_file_is_compared(mamba: Path) -> None:
    tensors = load_file(mamba / "model.safetensors")
    head = tensors["backbone.embeddings.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, mamba / "model.safetensors")
    ssm_modal.load_pretrained(mamba)
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, mamba / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head is tied .* holds a head of other values"):
        ssm_modal.load_pretrained(mamba)
    edit_json(mamba / "config.json", tie_word_embeddings=False)
    assert torch.equal(ssm_modal.load_pretrained(mamba).head.proj.weight, head)


def test_a_loaded_model_outlives_its_files(mamba: Path) -> None:
    ours = ssm_modal.load_pretrained(mamba)
    before = logits(ours)
    file = mamba / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(logits(ours), before)


def test_loading_takes_the_model_and_one_shard(tmp_path: Path) -> None:
    """Peak memory of a process that has loaded a tiny model before, and then loads one in many shards."""
    with torch.device("meta"):
        model = ssm_modal.create_model("mamba_lm", vocab_size=256, d_model=384, n_layers=8)
    whole = model.to_empty(device="cpu").to(torch.float32)
    with torch.no_grad():
        for p in whole.parameters():
            p.fill_(0.01)
    assert isinstance(whole, CausalLM)
    ssm_modal.save_pretrained(whole, tmp_path / "big", format="transformers", shard_bytes=4 << 20)
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 6
    code = (
        "import resource, sys, torch, ssm_modal\n"
        "ssm_modal.load_pretrained(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = ssm_modal.load_pretrained(sys.argv[2])\n"
        "size = sum(p.numel() * p.element_size() for p in model.parameters())\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, size)\n"
    )
    tiny = ssm_modal.create_model("mamba_lm", vocab_size=8, d_model=16, n_layers=1)
    ssm_modal.save_pretrained(tiny, tmp_path / "tiny", format="transformers")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tiny"), str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, size = map(int, done.stdout.split())
    assert size > 28 << 20
    assert grown < size + (4 << 20) + (6 << 20), f"{grown >> 20} MiB for a model of {size >> 20} MiB"


@pytest.mark.gpu
def test_loading_takes_the_weights_and_little_more_of_the_device(tmp_path: Path) -> None:
    model = ssm_modal.create_model("falcon_mamba_7b", d_model=1024, n_layers=8, vocab_size=8192)
    assert isinstance(model, CausalLM)
    ssm_modal.save_pretrained(model, tmp_path, format="transformers", shard_bytes=50_000_000)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = ssm_modal.load_pretrained(tmp_path, device="cuda", dtype=torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * size
    assert all(p.device.type == "cuda" for p in loaded.parameters())
    assert torch.equal(loaded.embedding.weight.cpu(), model.embedding.weight.bfloat16())


# ---------------------------------------------------------------- what can be wrong


def test_missing_shards_are_all_named(jamba: Path, tmp_path: Path) -> None:
    copy(jamba, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[2].unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 2 of \d+ shards: {shards[0].name}, {shards[2].name}$"):
        ssm_modal.load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 400, -20])
def test_a_truncated_shard_is_named(jamba: Path, tmp_path: Path, size: int) -> None:
    copy(jamba, tmp_path)
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{last.name} cannot be read; it may be cut short"):
        ssm_modal.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of shards"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "expected the names of files beside it"),
        ('{"weight_map": {"a": 3}}', r"names \[3\], expected"),
    ],
)
def test_a_wrong_index_is_named(mamba: Path, index: str, message: str) -> None:
    (mamba / "model.safetensors").rename(mamba / "other.safetensors")
    (mamba / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        ssm_modal.load_pretrained(mamba)


def test_every_missing_and_unexpected_key_is_listed(mamba: Path, jamba: Path, tmp_path: Path) -> None:
    tensors = load_file(mamba / "model.safetensors")
    gone = [k for k in tensors if ".0." in k]
    left = {k: v for k, v in tensors.items() if k not in gone}
    left["backbone.norm_f.weight"] = torch.zeros(3)
    extra = {f"extra.{i}": torch.zeros(1) for i in range(12)}
    save_file({**left, **extra}, mamba / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit CausalLM") as caught:
        ssm_modal.load_pretrained(mamba)
    for name in (*gone, *extra):
        assert name in str(caught.value)
    assert "of another shape: backbone.norm_f.weight (3,), expected (16,)" in str(caught.value)
    # One expert of a layer is missing.
    copy(jamba, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    key = next(k for k in index["weight_map"] if "experts.2.up_proj" in k)
    shard = tmp_path / index["weight_map"][key]
    save_file({k: v for k, v in load_file(shard).items() if k != key}, shard)
    with pytest.raises(CheckpointError, match=f"; missing: {key}$"):
        ssm_modal.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba2"}, r"unknown model_type 'mamba2' \(MambaForCausalLM\); did you mean 'mamba'"),
        ({"model_type": None}, "no config of a model known here"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which this architecture has only as 'silu'"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected an integer"),
        ({"num_hidden_layers": None}, "lacks the key 'num_hidden_layers', expected an integer"),
        ({"intermediate_size": 33}, "intermediate_size is 33, expected a multiple of hidden_size 16"),
        ({"state_size": 1000}, "describes no model that can be: .*d_state is 1000"),
        ({"quantization_config": {"bits": 4}}, "describes quantised weights"),
    ],
)
def test_a_wrong_config_is_named(mamba: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(mamba / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        ssm_modal.load_pretrained(mamba)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2', which this architecture has only as 'Mamba1'"),
        ({"ssm_cfg": {"d_stat": 3}}, "unknown keys d_stat"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\]"),
    ],
)
def test_a_wrong_state_spaces_config_is_named(
    mamba: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    ssm_modal.save_pretrained(ssm_modal.load_pretrained(mamba), tmp_path / "ss", format="state_spaces")
    edit_json(tmp_path / "ss" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        ssm_modal.load_pretrained(tmp_path / "ss")


def test_a_jamba_offset_outside_its_period_is_named(jamba: Path, tmp_path: Path) -> None:
    copy(jamba, tmp_path)
    edit_json(tmp_path / "config.json", attn_layer_offset=2)
    with pytest.raises(CheckpointError, match=r"attn_layer_offset is 2, expected 0 or more and below .* 2"):
        ssm_modal.load_pretrained(tmp_path)


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_in_a_file_is_run(mamba: Path, tmp_path: Path) -> None:
    ssm_modal.save_pretrained(ssm_modal.load_pretrained(mamba), tmp_path / "ss", format="state_spaces")
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "ss" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be read"):
        ssm_modal.load_pretrained(tmp_path / "ss")
    assert not (tmp_path / "sprung").exists()


def test_integer_weights_are_refused(mamba: Path) -> None:
    tensors = load_file(mamba / "model.safetensors")
    save_file({k: v.to(torch.int8) for k, v in tensors.items()}, mamba / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has dtype torch.int8, expected one of torch.float32"):
        ssm_modal.load_pretrained(mamba)


def test_dtypes_the_device_cannot_do(mamba: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int8, expected one of torch.float32"):
        ssm_modal.load_pretrained(mamba, dtype=torch.int8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device is cuda:1, but torch finds no NVIDIA GPU here"):
        ssm_modal.load_pretrained(mamba, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        ValueError, match=r"cuda \(compute capability 7.5\) cannot compute in; expected torch.float16"
    ):
        ssm_modal.load_pretrained(mamba, device="cuda", dtype=torch.bfloat16)


def test_too_little_memory_is_said_before_loading(mamba: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(t.numel() * 4 for t in load_file(mamba / "model.safetensors").values())
    monkeypatch.setattr(room, "free_memory", lambda device: size - 1)
    with pytest.raises(CheckpointError) as caught:
        ssm_modal.load_pretrained(mamba)
    text = str(caught.value)
    assert f"needs {size / 2**20:.2f} MiB for its weights, but cpu has" in text
    assert "in torch.bfloat16 it takes" in text
    assert "which fits" in text
    assert "room for about" in text
    ssm_modal.load_pretrained(mamba, dtype=torch.bfloat16)
    monkeypatch.setattr(room, "free_memory", lambda device: size)
    ssm_modal.load_pretrained(mamba)
    monkeypatch.setattr(room, "free_memory", lambda device: 10)
    with pytest.raises(CheckpointError, match=r"in torch.bfloat16 it takes .*, which does not fit either"):
        ssm_modal.load_pretrained(mamba)


def test_free_memory_is_asked_of_the_machine() -> None:
    free = room.free_memory(torch.device("cpu"))
    assert free is not None
    assert 1 << 20 < free < 1 << 50
    assert room.free_memory(torch.device("meta")) is None


# ---------------------------------------------------------------- saving


def test_saving_in_shards(jamba: Path, tmp_path: Path) -> None:
    ours = ssm_modal.load_pretrained(jamba)
    ssm_modal.save_pretrained(ours, tmp_path / "out", format="transformers", shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            sizes = [opened.get_tensor(k).numel() * 4 for k in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    assert same(ssm_modal.load_pretrained(tmp_path / "out"), ours)


def unlike(**more: Any) -> CausalLM:
    made = ssm_modal.create_model("jamba_lm", vocab_size=8, d_model=16, n_layers=4, n_heads=2, **more)
    assert isinstance(made, CausalLM)
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ssm_modal.create_model("s4d_lm", d_model=8, n_layers=2),
            "as jamba: a layer is of another kind",
        ),
        (
            lambda: ssm_modal.create_model("transformer_lm", d_model=8, n_layers=2),
            "its attention has rotary positions",
        ),
        (
            lambda: ssm_modal.create_model("hybrid_lm", d_model=8, n_layers=8),
            "no norms with weights on dt, B and C; a layer has no MLP",
        ),
        (
            lambda: ssm_modal.create_model(
                "mamba_lm", d_model=8, n_layers=1, bc_dt_norm_eps=1e-6, bc_dt_norm_weights=True
            ),
            "as falcon_mamba: its norms on dt, B and C have weights",
        ),
        (lambda: unlike(**{"mlp.0.d_hidden": 24, "mlp.1.d_hidden": 32}), r"different widths, \[24, 32\]"),
        (lambda: unlike(norm_eps=1e-3), "bc_dt_norm_eps is 1e-06, expected norm_eps 0.001"),
        (
            lambda: unlike(
                mixer=(*unlike().config.backbone.mixer[3:5], *unlike().config.backbone.mixer[4:6])
            ),
            "attention layers do not stand at equal distances",
        ),
    ],
)
def test_what_transformers_has_no_words_for_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_modal.save_pretrained(make(), tmp_path / "out", format="transformers")
    assert not any(tmp_path.iterdir())


def test_saving_needs_a_new_folder_and_leaves_nothing_behind(
    mamba: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ssm_modal.load_pretrained(mamba)
    before = {p.name: p.read_bytes() for p in mamba.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds files, expected a new or an empty folder"):
        ssm_modal.save_pretrained(ours, mamba, format="transformers")
    assert {p.name: p.read_bytes() for p in mamba.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"is a file"):
        ssm_modal.save_pretrained(ours, mamba / "config.json", format="transformers")
    with pytest.raises(ValueError, match=r"format is 'onnx', expected one of ssm_modal, transformers"):
        ssm_modal.save_pretrained(ours, tmp_path / "out", format="onnx")  # type: ignore[arg-type]

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for name, module in (("save_file", "ssm_modal.checkpoints.saving"), ("save", "torch")):
        monkeypatch.setattr(f"{module}.{name}", full)
        with pytest.raises(OSError, match=r"No space left"):
            ssm_modal.save_pretrained(
                ours, tmp_path / "out", format="transformers" if name == "save_file" else "state_spaces"
            )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mamba"]


# ---------------------------------------------------------------- tokenizer, command line


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "a", "b", "c"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<eos>"])
    made.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def test_convert_there_and_back(mamba: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tokenizer(mamba)
    (mamba / "generation_config.json").write_text(
        '{"eos_token_id": 1, "temperature": 0.7, "do_sample": true}'
    )
    edit_json(mamba / "config.json", eos_token_id=1)
    assert main(["convert", str(mamba), str(tmp_path / "own"), "--to", "ssm_modal"]) == 0
    assert "parameters in the format ssm_modal: config.json, generation_config.json, model.safetensors" in (
        capsys.readouterr().out
    )
    assert load_tokenizer(tmp_path / "own").encode("c a b") == [4, 2, 3]
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "transformers"]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    want = theirs("mamba", SMALL)
    assert torch.equal(their_logits(back, IDS), their_logits(want, IDS))
    assert back.config.eos_token_id == 1
    assert (back.generation_config.eos_token_id, back.generation_config.temperature) == (1, 0.7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("c a b")["input_ids"] == [4, 2, 3]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<eos>", "{{ messages }}")
    assert (
        main(["convert", str(mamba), str(tmp_path / "ss"), "--to", "state_spaces", "--dtype", "bfloat16"])
        == 0
    )
    half = ssm_modal.load_pretrained(tmp_path / "ss")
    assert half.embedding.weight.dtype == torch.bfloat16
    assert main(["convert", str(mamba), str(tmp_path / "ss"), "--to", "transformers"]) == 1
    assert "is there already, expected a new or an empty folder" in capsys.readouterr().err


def test_special_ids_of_a_config_outlive_the_package_s_own_format(mamba: Path, tmp_path: Path) -> None:
    (mamba / "generation_config.json").unlink(missing_ok=True)
    edit_json(mamba / "config.json", eos_token_id=3, pad_token_id=1)
    ours = ssm_modal.load_pretrained(mamba)
    ssm_modal.save_pretrained(ours, tmp_path / "own", source=mamba)
    ssm_modal.save_pretrained(ours, tmp_path / "back", format="transformers", source=tmp_path / "own")
    document = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [document[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, 3, 1]


def test_a_model_of_a_run_goes_to_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = ssm_modal.create_model("mamba_lm", vocab_size=5, d_model=16, n_layers=1)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    write_tokenizer(run)
    load_tokenizer(run).save(run / "tokenizer.json")  # as a run keeps it
    (run / "tokenizer_config.json").unlink()
    hyper = {"model": "mamba_lm", "model_config": model.config.to_dict()}
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": hyper}, run / "checkpoints" / "last.ckpt")
    ssm_modal.save_pretrained(model, tmp_path / "out", format="transformers", source=run)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("c a")["input_ids"] == [4, 2]
    assert tokenizer.eos_token == "<eos>"
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["eos_token_id"] is None, "transformers' default, 0, would end texts at the first id"
    ours = ByteTokenizer(["pad", "eos"])
    ours.save(run / "tokenizer.json")
    ssm_modal.save_pretrained(model, tmp_path / "bytes", format="transformers", source=run)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    text = "a B\n\t ½ 語\x00~\u00ad" + "".join(map(chr, range(256)))
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (len(theirs), theirs.pad_token_id, theirs.eos_token_id) == (258, 256, 257)
    CharTokenizer("ab").save(run / "tokenizer.json")
    with pytest.raises(
        CheckpointError, match=r"a tokenizer of kind 'char' has no form that transformers reads"
    ):
        ssm_modal.save_pretrained(model, tmp_path / "other", format="transformers", source=run)
    assert not (tmp_path / "other").exists()


def test_what_config_json_says_of_a_published_size() -> None:
    from ssm_modal.checkpoints.formats import family_of_config
    from ssm_modal.models import CausalLMConfig

    config = model_config("jamba_v0_1")
    assert isinstance(config, CausalLMConfig)
    document = family_of_config(config).write(config)
    wanted = {
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    assert wanted.items() <= document.items()
    assert document["mamba_dt_rank"] == 256
    assert "head_dim" not in document

"""The causal language model, its configs and overrides, the registry, parity with transformers' Mamba."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.backbone import BackboneConfig
from ssm_modal.errors import ConfigError
from ssm_modal.layers import AttentionConfig, MambaConfig, MLPConfig, S4DConfig
from ssm_modal.models import (
    CausalLM,
    CausalLMConfig,
    MaskedLMConfig,
    ModelConfig,
    SequenceClassifierConfig,
    SequenceCNNConfig,
    VisionMambaConfig,
    WaveformCNNConfig,
    model_config,
    register_model,
)
from ssm_modal.models import registry as registry_module
from tests.tolerances import OUTPUT, assert_close

SMALL: dict[str, Any] = {"vocab_size": 11, "d_model": 16, "n_layers": 2}


def small(name: str = "mamba_lm", **more: Any) -> CausalLM:
    if name in ("transformer_lm",):
        more = {"n_heads": 2, **more}
    model = ssm_modal.create_model(name, **SMALL, **more)
    assert isinstance(model, CausalLM)
    return model


GENERIC = ("mamba_lm", "s4d_lm", "transformer_lm")


@pytest.mark.parametrize("name", GENERIC)
def test_segments_steps_and_packing(name: str, device: torch.device) -> None:
    model = small(name).to(device, torch.float64)
    ids = torch.randint(0, 11, (2, 14), device=device)
    with torch.no_grad():
        logits, _ = model(ids)
        assert logits.shape == (2, 14, 11)
        a, state = model(ids[:, :5])
        b, state = model(ids[:, 5:], state)
        assert_close(torch.cat([a, b], 1), logits, OUTPUT[torch.float64])
        mine = model.init_state(2)
        steps = [model.step_(ids[:, t : t + 1], mine) for t in range(14)]
        assert_close(torch.cat(steps, 1), logits, OUTPUT[torch.float64])
        cu = torch.tensor([0, 14, 28], device=device)
        packed, _ = model(ids.reshape(1, 28), seqs=cu)
        assert_close(packed.reshape(2, 14, 11), logits, OUTPUT[torch.float64])
        hidden, _ = model.hidden(ids)
        assert_close(model.logits(hidden[:, 3]), logits[:, 3], OUTPUT[torch.float64])
        assert torch.equal(model.head(hidden), logits)


def test_equals_transformers_mamba() -> None:
    """The published architecture as transformers has it, with copied weights: logits, prefill and a decoded
    token."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=29, hidden_size=32, state_size=8, num_hidden_layers=3)
    ).eval()
    ours = ssm_modal.create_model("mamba_lm", vocab_size=29, d_model=32, n_layers=3, d_state=8)
    names = {
        "embedding.weight": "backbone.embeddings.weight",
        "backbone.norm.weight": "backbone.norm_f.weight",
    }
    weights = {}
    source = theirs.state_dict()
    for name in ours.state_dict():
        weights[name] = source[names.get(name, name.replace("dt_bias", "dt_proj.bias"))]
    assert len(weights) == len(source) - 1  # theirs lists the tied head as well
    ours.load_state_dict(weights)
    ids = torch.randint(0, 29, (2, 21))
    with torch.no_grad():
        want = theirs(ids).logits
        got, _ = ours(ids)
        assert_close(got, want, OUTPUT[torch.float32])
        _, state = ours(ids[:, :20])
        step, _ = ours(ids[:, 20:], state)
        assert_close(step[:, 0], want[:, 20], OUTPUT[torch.float32])


def test_the_embedding_is_tied_or_not() -> None:
    tied, untied = small(), small(tie_embeddings=False)
    assert "head.proj.weight" not in tied.state_dict()
    assert untied.state_dict()["head.proj.weight"].shape == (11, 16)
    n = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert n(untied) == n(tied) + 11 * 16
    big = ssm_modal.create_model("mamba_lm", vocab_size=4000, d_model=16, n_layers=1)
    assert abs(big.embedding.weight.std().item() - 0.02) < 0.0005
    import copy

    copied = copy.deepcopy(tied)
    with torch.no_grad():
        copied.embedding.weight.zero_()
    assert copied(torch.tensor([[1]]))[0].abs().max() == 0
    assert tied(torch.tensor([[1]]))[0].abs().max() > 0


def test_a_padded_vocabulary_predicts_no_padding() -> None:
    model = small(pad_vocab_multiple=8)
    assert model.embedding.weight.shape == (16, 16)
    assert model(torch.tensor([[10]]))[0].shape == (1, 1, 11)
    with pytest.raises(ValueError, match="the largest id is 11, expected 0 to 10"):
        model(torch.tensor([[0, 11]]))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([[3, 12, 99]]), ValueError, "the largest id is 99, expected 0 to 10"),
        (torch.tensor([[3, -2]]), ValueError, "the smallest id is -2, expected 0 to 10"),
        (torch.tensor([1, 2]), ValueError, r"ids has shape \(2,\), expected \(batch, length\)"),
        (torch.tensor([[1.0]]), TypeError, "ids has dtype torch.float32, expected int64 or int32"),
        ([[1]], TypeError, "ids must be a tensor, got list"),
    ],
)
def test_wrong_ids_are_named(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(ids)


def test_a_step_takes_one_token() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"ids has shape \(1, 2\), expected \(batch, 1\)"):
        model.step_(torch.tensor([[1, 2]]), model.init_state(1))


def test_compiles_whole_from_ids() -> None:
    model = ssm_modal.create_model("mamba_lm", vocab_size=11, d_model=16, n_layers=1)
    ids = torch.randint(0, 11, (2, 6))
    got, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    assert_close(got, model(ids)[0], OUTPUT[torch.float32])


# ---------------------------------------------------------------- configs


FULL = CausalLMConfig(
    vocab_size=5,
    backbone=BackboneConfig(
        d_model=8,
        n_layers=3,
        mixer=(MambaConfig(dt_rank=3), AttentionConfig(n_heads=2, rope_theta=None), S4DConfig(init="inv")),
        mlp=MLPConfig("gelu"),
    ),
    tie_embeddings=False,
)


def test_configs_go_to_json_and_back() -> None:
    text = json.dumps(FULL.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == FULL
    plain = FULL.to_dict()
    assert plain["type"] == "causal_lm"
    assert [m["type"] for m in plain["backbone"]["mixer"]] == ["mamba", "attention", "s4d"]
    assert plain["backbone"]["bidirectional"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(vocab_sise=3), "unknown key 'vocab_sise'; did you mean 'vocab_size'"),
        (
            lambda d: d["backbone"]["mixer"][0].update(d_sate=1),
            r"mixer.0: unknown key 'd_sate'; did you mean 'd_state'",
        ),
        (
            lambda d: d["backbone"]["mixer"][1].update(type="atention"),
            "unknown type 'atention'; did you mean 'attention'",
        ),
        (lambda d: d["backbone"]["mixer"][1].pop("type"), r"mixer.1: the key 'type' is missing"),
        (lambda d: d["backbone"].pop("d_model"), "backbone: the key 'd_model' is missing"),
        (lambda d: d["backbone"].update(d_model="8"), "backbone.d_model: got '8', expected an integer"),
        (
            lambda d: d["backbone"].update(mlp=3),
            "backbone.mlp: got 3, expected FeedForwardConfig or a list",
        ),
        (lambda d: d.update(backbone=None), "backbone: expected a mapping"),
        (lambda d: d.update(type="mamba"), "unknown type 'mamba'"),
    ],
)
def test_wrong_plain_data_is_named(change: Any, message: str) -> None:
    data = json.loads(json.dumps(FULL.to_dict()))
    change(data)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(data)


def test_overrides_short_dotted_and_nested() -> None:
    config = model_config("mamba_lm", vocab_size=16, d_model=64, n_layers=2, d_state=5)
    assert (config.vocab_size, config.backbone.d_model, config.backbone.n_layers) == (16, 64, 2)  # type: ignore[attr-defined]
    assert config.backbone.mixer.d_state == 5  # type: ignore[attr-defined]
    dotted = model_config("mamba_lm", **{"backbone.mixer.d_state": 7, "mixer.d_conv": 2})
    assert dotted.backbone.mixer == MambaConfig(d_state=7, d_conv=2)  # type: ignore[attr-defined]
    nested = model_config("mamba_lm", backbone={"n_layers": 3, "mixer": {"expand": 1}})
    assert nested.backbone == BackboneConfig(d_model=256, n_layers=3, mixer=MambaConfig(expand=1))  # type: ignore[attr-defined]
    other = model_config(
        "mamba_lm", mixer={"type": "s4d", "init": "inv"}, d_state=9, mlp={"type": "mlp", "activation": "gelu"}
    )
    assert other.backbone.mixer == S4DConfig(init="inv", d_state=9)  # type: ignore[attr-defined]
    assert other.backbone.mlp == MLPConfig("gelu")  # type: ignore[attr-defined]
    assert model_config("transformer_lm", mlp=None).backbone.mlp is None  # type: ignore[attr-defined]
    both = model_config("mamba_lm", dt_min=0.2, dt_max=0.5).backbone.mixer  # type: ignore[attr-defined]
    assert (both.dt_min, both.dt_max) == (0.2, 0.5)  # checked together, not one by one
    assert model_config("mamba_lm", mixer=AttentionConfig(n_heads=2)).backbone.mixer.n_heads == 2  # type: ignore[attr-defined]


def test_a_pattern_may_be_given_as_plain_data() -> None:
    plain = [{"type": "mamba", "d_state": 4}, {"type": "attention", "n_heads": 2}]
    config = model_config("mamba_lm", mixer=plain, n_heads=4)
    assert config.backbone.mixer == (MambaConfig(d_state=4), AttentionConfig(n_heads=4))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"mixer\.1: unknown key 'n_head'; did you mean 'n_heads'"):
        model_config("mamba_lm", mixer=[plain[0], {"type": "attention", "n_head": 2}])


def test_overrides_reach_into_patterns() -> None:
    every = model_config("hybrid_lm", d_state=3).backbone.mixer  # type: ignore[attr-defined]
    assert [getattr(m, "d_state", None) for m in every] == [3, 3, 3, 3, None, 3, 3, 3]
    one = model_config("hybrid_lm", **{"backbone.mixer.1.d_state": 3, "mixer.4.n_heads": 8}).backbone.mixer  # type: ignore[attr-defined]
    assert [getattr(m, "d_state", None) for m in one] == [16, 3, 16, 16, None, 16, 16, 16]
    assert one[4].n_heads == 8
    swapped = model_config("hybrid_lm", **{"backbone.mixer.0": {"type": "s4d"}}).backbone.mixer  # type: ignore[attr-defined]
    assert swapped[0] == S4DConfig()
    assert swapped[1] == MambaConfig()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_sate": 3}, "unknown key 'd_sate' for CausalLMConfig; did you mean 'd_state'"),
        ({"backbone.mixr.d_state": 3}, "did you mean 'backbone.mixer.d_state'"),
        ({"mixer": {"d_stat": 3}}, "unknown key 'd_stat'; did you mean 'd_state'"),
        ({"d_state": "x"}, "MambaConfig.d_state: got 'x', expected an integer"),
        ({"n_heads": 2}, "unknown key 'n_heads'"),
        ({"mixer": {"type": "mamba3"}}, "unknown type 'mamba3'; did you mean 'mamba'"),
        ({"bidirectional": {}}, "a causal model may not see the future"),
        ({"mixer": {"type": "attention", "causal": False}}, "the mixer of layer 0 has causal=False"),
    ],
)
def test_wrong_overrides_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config("mamba_lm", **overrides)


def test_an_ambiguous_short_name_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'bias' is ambiguous .* backbone.mixer.bias, backbone.mlp.bias"):
        model_config("transformer_lm", bias=True)
    assert model_config("transformer_lm", **{"mlp.bias": True}).backbone.mlp.bias is True  # type: ignore[attr-defined]


# ---------------------------------------------------------------- registry


def test_the_registry_lists_by_pattern() -> None:
    names = ssm_modal.list_models()
    assert {
        *GENERIC,
        "hybrid_lm",
        "mamba_130m",
        "mamba_370m",
        "mamba_790m",
        "mamba_1_4b",
        "mamba_2_8b",
    } <= set(names)
    assert names == sorted(names)
    assert ssm_modal.list_models("mamba_*b") == ["mamba_1_4b", "mamba_2_8b"]
    assert ssm_modal.list_models("nothing") == []
    with pytest.raises(ConfigError, match="unknown model 'mamba_lmm'; did you mean 'mamba_lm'"):
        ssm_modal.create_model("mamba_lmm")


def test_registering_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_builders", dict(registry_module._builders))

    @register_model
    def my_model() -> CausalLMConfig:
        return FULL

    assert "my_model" in ssm_modal.list_models()
    assert register_model(my_model) is my_model

    def mamba_lm() -> CausalLMConfig:
        return FULL

    with pytest.raises(
        ValueError, match=r"the name 'mamba_lm' is taken by ssm_modal.models.builders.mamba_lm"
    ):
        register_model(mamba_lm)


@pytest.mark.parametrize("name", ssm_modal.list_models())
def test_every_registered_model_builds_and_runs_small(name: str) -> None:
    config = model_config(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    if isinstance(config, SequenceCNNConfig):
        logits, state = ssm_modal.create_model(name, n_classes=3, d_model=32)(torch.tensor([[1, 2, 3] * 4]))
        assert logits.shape == (1, 3)
        assert state is None
        return
    if isinstance(config, WaveformCNNConfig):
        logits, state = ssm_modal.create_model(name, n_classes=3)(torch.randn(2, 800))
        assert logits.shape == (2, 3)
        assert state is None
        return
    if isinstance(config, VisionMambaConfig):
        pytest.importorskip("timm")
        vision = ssm_modal.create_model(name, n_classes=3, d_model=32, n_layers=2, img_size=32)
        logits = vision(torch.randn(1, config.in_chans, 32, 32))
        assert logits.shape == (1, 3)
        assert torch.isfinite(logits).all()
        return
    if isinstance(config, SequenceClassifierConfig):
        classifier = ssm_modal.create_model(name, n_classes=3, d_model=32, n_layers=2)
        shape = (1, 40, config.input.channels) if config.input.type == "vectors" else (1, 40)
        x = torch.tensor([[1, 2, 3]]) if config.input.type == "ids" else torch.randn(shape)
        logits, state = classifier(x)
        assert logits.shape == (1, 3)
        assert torch.isfinite(logits).all()
        assert (state is not None) == (config.causal and config.strands is None)
        return
    # A model of both strands has the vocabulary of its tokenizer alone.
    vocab_size = config.vocab_size if getattr(config, "strands", None) else 10
    model = ssm_modal.create_model(name, vocab_size=vocab_size, d_model=32, n_layers=2)
    logits, state = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, vocab_size)
    assert torch.isfinite(logits).all()
    assert state is None if isinstance(config, MaskedLMConfig) else state.batch_size == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    # counted from the published safetensors / the sizes of the paper's models
    [("mamba_130m", 129_135_360), ("mamba_370m", 371_516_416), ("mamba_2_8b", 2_768_345_600)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ssm_modal.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_baselines_are_of_the_same_size() -> None:
    def size(name: str, **more: Any) -> int:
        with torch.device("meta"):
            model = ssm_modal.create_model(name, d_model=256, **more)
        return sum(p.numel() for p in model.backbone.parameters())

    mamba = size("mamba_lm", n_layers=8)
    assert abs(size("s4d_lm", n_layers=8) / mamba - 1) < 0.1
    assert abs(size("transformer_lm", n_layers=4) / mamba - 1) < 0.1


def test_configs_are_hashable_and_replaceable() -> None:
    assert hash(FULL) == hash(replace(FULL))
    assert replace(FULL, vocab_size=6) != FULL

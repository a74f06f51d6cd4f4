"""The backbone: the laws over stacks and hybrids, the residual stream, initialisation, checkpointing,
compiling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ssm_modal.backbone import Backbone, BackboneConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import AttentionConfig, BidirectionalConfig, MambaConfig, MLPConfig, S4DConfig
from tests.ssm_modal import layer_laws as laws
from tests.tolerances import GRADIENT, OUTPUT, assert_close

MAMBA, S4D, ATTENTION = MambaConfig(d_state=4), S4DConfig(d_state=3), AttentionConfig(n_heads=2)
CONFIGS = {
    "mamba": BackboneConfig(d_model=16, n_layers=2, mixer=MAMBA),
    "transformer": BackboneConfig(d_model=16, n_layers=2, mixer=ATTENTION, mlp=MLPConfig()),
    "hybrid": BackboneConfig(
        d_model=16, n_layers=3, mixer=(MAMBA, ATTENTION), mlp=MLPConfig("gelu", bias=True)
    ),
    "s4d": BackboneConfig(d_model=16, n_layers=2, mixer=S4D),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_laws(name: str, device: torch.device) -> None:
    laws.all_laws(Backbone(CONFIGS[name]).to(device, torch.float64), torch.float64)


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_equals_the_plain_residual_sum(name: str) -> None:
    """x + mixer(norm(x)), then x + mlp(norm(x)), written without the fused add."""
    backbone = Backbone(CONFIGS[name]).double()
    x = torch.randn(2, 9, 16).double()
    with torch.no_grad():
        for norm in [m for m in backbone.modules() if type(m).__name__ == "RMSNorm"]:
            norm.weight.add_(0.3 * torch.randn_like(norm.weight))
        got, _ = backbone(x)
        for block in backbone.layers:
            x = x + block.mixer(block.norm(x))[0]
            if block.mlp is not None:
                x = x + block.mlp(block.mlp_norm(x))
        rms = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_close(got, x / rms * backbone.norm.weight, OUTPUT[torch.float64])


def test_a_pattern_of_mixers_repeats() -> None:
    config = BackboneConfig(d_model=16, n_layers=5, mixer=(MAMBA, MAMBA, ATTENTION))
    names = [type(block.mixer).__name__ for block in Backbone(config).layers]
    assert names == ["Mamba", "Mamba", "Attention", "Mamba", "Mamba"]


def test_the_residual_stream_is_fp32() -> None:
    """In bf16, small branches still add up: 64 layers each adding less than half a bf16 unit of the
    stream."""
    kept: dict[bool, torch.Tensor] = {}
    x = torch.full((1, 4, 16), 256.0)
    for wide in (True, False):
        torch.manual_seed(0)
        config = BackboneConfig(d_model=16, n_layers=64, mixer=MAMBA, residual_in_fp32=wide)
        backbone = Backbone(config)
        for block in backbone.layers:  # each branch adds 0.25 to channel 0
            torch.nn.init.zeros_(block.mixer.out_proj.weight)
            block.mixer.out_proj.bias = torch.nn.Parameter(torch.tensor([0.25] + [0.0] * 15))
        with torch.no_grad():
            kept[wide] = backbone.to(torch.bfloat16)(x.bfloat16())[0]
    assert kept[True].dtype == kept[False].dtype == torch.bfloat16
    ratio = lambda y: float(y[0, 0, 0] / y[0, 0, 1])  # noqa: E731
    assert abs(ratio(kept[True]) - 272 / 256) < 0.01
    assert ratio(kept[False]) == 1.0


@pytest.mark.parametrize(("mlp", "writes"), [(None, 8), (MLPConfig(bias=True), 16)])
def test_initialisation_scales_what_writes_into_the_stream_once(mlp: MLPConfig | None, writes: int) -> None:
    d = 64
    backbone = Backbone(
        BackboneConfig(d_model=d, n_layers=8, mixer=(MambaConfig(bias=True), ATTENTION), mlp=mlp)
    )
    for block in backbone.layers:
        out = block.mixer.out_proj
        # a Linear's default, uniform within 1 / sqrt(fan_in), scaled by the writes
        bound = 1 / math.sqrt(out.in_features * writes)
        assert 0.97 * bound < out.weight.abs().max() <= bound * 1.0001
        if block.mlp is not None:
            bound = 1 / math.sqrt(block.mlp.out_proj.in_features * writes)
            assert 0.97 * bound < block.mlp.out_proj.weight.abs().max() <= bound * 1.0001
            assert block.mlp.up_proj.weight.abs().max() > 0.97 / math.sqrt(d)
        for module in block.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                assert module.bias.abs().max() == 0
    mamba = backbone.layers[0].mixer
    assert mamba.in_proj.weight.abs().max() > 0.97 / math.sqrt(d)
    assert mamba.dt_bias.abs().max() > 0


@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("share", ["none", "projections", "all"])
def test_bidirectional_initialisation_and_run(share: str, combine: str) -> None:
    wrap = BidirectionalConfig(combine=combine, share=share)  # type: ignore[arg-type]
    both = AttentionConfig(n_heads=2, causal=False)
    backbone = Backbone(BackboneConfig(d_model=16, n_layers=4, mixer=(MAMBA, both), bidirectional=wrap))
    assert [type(b.mixer).__name__ for b in backbone.layers] == ["Bidirectional", "Attention"] * 2
    for block in backbone.layers:
        for weight in block.residual_weights():
            assert weight.abs().max() <= 1.0001 / math.sqrt(weight.shape[1] * 4)
    y, state = backbone(torch.randn(2, 5, 16))
    assert state is None
    assert y.shape == (2, 5, 16)
    with pytest.raises(StateError, match="has no state"):
        backbone.init_state(1)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    backbone = Backbone(CONFIGS["hybrid"]).double().train()
    x = torch.randn(2, 9, 16).double().requires_grad_()
    saved, grads = [], []
    for again in (False, True):
        backbone.gradient_checkpointing = again
        bytes_saved = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_saved
            bytes_saved += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, state = backbone(x)
        saved.append(bytes_saved)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *backbone.parameters()]))
        assert len(state) == 3
    assert saved[1] < saved[0] / 3
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_dropout_is_off_in_eval_and_reaches_every_branch() -> None:
    config = replace(CONFIGS["hybrid"], dropout=0.5)
    backbone, plain = Backbone(config).double(), Backbone(CONFIGS["hybrid"]).double()
    plain.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 6, 16).double()
    with torch.no_grad():
        assert torch.equal(backbone.eval()(x)[0], plain(x)[0])
        assert not torch.equal(backbone.train()(x)[0], plain(x)[0])
    assert sum(isinstance(m, torch.nn.Dropout) for m in backbone.modules()) == 3


def test_cu_seqlens_are_taken_and_checked_at_the_boundary() -> None:
    backbone = Backbone(CONFIGS["mamba"]).double()
    x = torch.randn(1, 7, 16).double()
    with torch.no_grad():
        a, _ = backbone(x, seqs=torch.tensor([0, 3, 3, 7], dtype=torch.int32))
        b, _ = backbone(x, seqs=Sequences.from_lengths([3, 0, 4]))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="cu_seqlens ends at 6, expected 7"):
        backbone(x, seqs=torch.tensor([0, 6]))


def test_wrong_states_are_named() -> None:
    backbone = Backbone(CONFIGS["mamba"])
    other = Backbone(replace(CONFIGS["mamba"], n_layers=3))
    x = torch.randn(2, 3, 16)
    with pytest.raises(StateError, match="state has 3 layers, expected 2"):
        backbone(x, other.init_state(2))
    with pytest.raises(StateError, match="state has 1 rows, expected 2"):
        backbone(x, backbone.init_state(1))
    with pytest.raises(StateError, match="state is a tuple, expected BackboneState"):
        backbone(x, tuple(backbone.init_state(2)))
    with pytest.raises(StateError, match="Mamba: state is a AttentionState, expected MambaState"):
        backbone(x, Backbone(CONFIGS["transformer"]).init_state(2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"mixer": ()}, "mixer is an empty list"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 or more and below 1"),
        ({"mixer": "mamba"}, "mixer: got 'mamba', expected MixerConfig or a list of MixerConfig"),
        ({"norm_eps": 0}, "norm_eps is 0.0, expected more than 0"),
    ],
)
def test_a_wrong_config_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(**{"d_model": 16, "n_layers": 1, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mamba", "transformer", "s4d"])
def test_compiles_whole(name: str) -> None:
    """One graph, with a state in and out, equal to the eager run; gradients too."""
    backbone = Backbone(replace(CONFIGS[name], n_layers=1))
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 16)
    y, state = compiled(x)
    w, own = backbone(x)
    assert_close(y, w, OUTPUT[torch.float32])
    laws.assert_states_close(state, own, OUTPUT[torch.float32], "compiled")
    y2, _ = compiled(x, state)
    assert_close(y2, backbone(x, own)[0], OUTPUT[torch.float32])
    got = torch.autograd.grad(y2.square().sum(), list(backbone.parameters()))
    want = torch.autograd.grad(backbone(x, own)[0].square().sum(), list(backbone.parameters()))
    for g, v in zip(got, want):
        assert_close(g, v, GRADIENT[torch.float32])

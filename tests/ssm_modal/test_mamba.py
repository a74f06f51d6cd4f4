"""The Mamba layer: the laws, an independent forward, transformers' mixer, initialisation, casts."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels import use_backend
from ssm_modal.kernels.dispatch import interpreting
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import Mamba, MambaConfig, MambaState, S4DState
from tests.ssm_modal import layer_laws as laws
from tests.tolerances import OUTPUT, assert_close

CONFIGS = {
    "default": MambaConfig(),
    "odd": MambaConfig(d_state=5, d_conv=3, expand=3, dt_rank=2, conv_bias=False, bias=True),
    "normed": MambaConfig(d_state=8, bc_dt_norm_eps=1e-6),
    "no memory in the convolution": MambaConfig(d_conv=1),
}


def naive_forward(layer: Mamba, x: Tensor) -> Tensor:
    """The layer from the paper's algorithm 2 and figure 3, one row and one step at a time, without the
    ops."""
    d, n, r = layer.d_inner, layer.d_state, layer.dt_rank
    A = -torch.exp(layer.A_log)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        xz = F.linear(x[b], layer.in_proj.weight, layer.in_proj.bias)
        u, z = xz[:, :d], xz[:, d:]
        taps = layer.conv1d.weight.shape[-1]
        padded = torch.cat([u.new_zeros(taps - 1, d), u])
        h = u.new_zeros(d, n)
        for t in range(x.shape[1]):
            v = (padded[t : t + taps] * layer.conv1d.weight[:, 0].T).sum(0)
            if layer.conv1d.bias is not None:
                v = v + layer.conv1d.bias
            v = v * torch.sigmoid(v)
            dbc = layer.x_proj.weight @ v
            dt, B, C = dbc[:r], dbc[r : r + n], dbc[r + n :]
            eps = layer.config.bc_dt_norm_eps
            if eps is not None:
                dt, B, C = (w / (w.square().mean() + eps).sqrt() for w in (dt, B, C))
            dt = torch.log1p(torch.exp(layer.dt_proj.weight @ dt + layer.dt_bias))
            h = torch.exp(dt[:, None] * A) * h + (dt * v)[:, None] * B[None, :]
            y = (h @ C + layer.D * v) * (z[t] * torch.sigmoid(z[t]))
            out[b, t] = F.linear(y, layer.out_proj.weight, layer.out_proj.bias)
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_laws(name: str, device: torch.device) -> None:
    layer = CONFIGS[name].build(24).to(device, torch.float64)
    laws.all_laws(layer, torch.float64)
    laws.reverse_equals_flip_layer_flip(layer, torch.float64)
    laws.packed_equals_separate(layer, torch.float64, reverse=True)


def test_laws_in_fp32(device: torch.device) -> None:
    layer = MambaConfig().build(32).to(device)
    laws.all_laws(layer, torch.float32)
    laws.reverse_equals_flip_layer_flip(layer, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_an_independent_forward(name: str) -> None:
    layer = CONFIGS[name].build(12).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(2, 11, 12, dtype=torch.float64)
        assert_close(layer(x)[0], naive_forward(layer, x), OUTPUT[torch.float64])


def test_equals_transformers_mixer() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig as TheirConfig

    theirs = modeling.MambaMixer(
        TheirConfig(hidden_size=32, state_size=8, num_hidden_layers=1), layer_idx=0
    ).eval()
    ours = MambaConfig(d_state=8).build(32)
    weights = {("dt_bias" if k == "dt_proj.bias" else k): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    x = torch.randn(2, 17, 32)
    with torch.no_grad():
        assert_close(ours(x)[0], theirs(x), OUTPUT[torch.float32])


def test_initialisation_as_published() -> None:
    layer = MambaConfig(d_state=7, dt_rank="auto").build(100)
    assert layer.dt_rank == math.ceil(100 / 16) == 7
    assert torch.equal(layer.A_log, torch.log(torch.arange(1.0, 8.0)).expand(200, 7))
    assert torch.equal(layer.D, torch.ones(200))
    dt = F.softplus(layer.dt_bias)
    assert 0.001 * 0.999 <= dt.min() < 0.002
    assert 0.05 < dt.max() <= 0.1 * 1.001
    # log-uniform: half of the steps lie below the geometric mean
    assert 0.35 < (dt < 0.01).float().mean() < 0.65
    assert layer.dt_proj.weight.abs().max() <= 7**-0.5
    assert layer.dt_proj.weight.abs().max() > 0.95 * 7**-0.5
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes == {
        "dt_bias": (200,),
        "A_log": (200, 7),
        "D": (200,),
        "in_proj.weight": (400, 100),
        "conv1d.weight": (200, 1, 4),
        "conv1d.bias": (200,),
        "x_proj.weight": (21, 200),
        "dt_proj.weight": (200, 7),
        "out_proj.weight": (100, 200),
    }


def test_dt_floor() -> None:
    layer = MambaConfig(dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-4).build(8)
    assert_close(F.softplus(layer.dt_bias), torch.full((16,), 1e-4), 1e-4)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.double().bfloat16(),
        lambda m: torch.nn.Sequential(m).bfloat16()[0],
    ],
)
def test_casts_keep_the_state_space_parameters(cast: object) -> None:
    layer = MambaConfig().build(16)
    with torch.no_grad():
        layer.A_log.add_(1e-4 * torch.rand_like(layer.A_log))  # values that bf16 would round
    before = {n: layer.get_parameter(n).clone() for n in ("A_log", "D", "dt_bias")}
    layer.dt_bias.grad = torch.full_like(layer.dt_bias, 1 / 3)
    layer = cast(layer)  # type: ignore[operator]
    assert layer.in_proj.weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in before.items():
        assert layer.get_parameter(name).dtype == torch.float32
        assert torch.equal(layer.get_parameter(name), value), name
        assert layer.get_parameter(name)._no_weight_decay is True
    assert layer.dt_bias.grad.dtype == torch.float32
    assert layer.dt_bias.grad[0] == torch.tensor(1 / 3)


def test_double_casts_all() -> None:
    layer = MambaConfig().build(16).double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_marks_survive_copies(again: object) -> None:
    layer = again(MambaConfig().build(16))  # type: ignore[operator]
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias"}


def test_loading_by_assignment_keeps_marks_and_precision() -> None:
    layer = MambaConfig().build(16)
    layer.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()}, assign=True)
    assert layer.in_proj.weight.dtype == torch.bfloat16
    for name in ("A_log", "D", "dt_bias"):
        assert layer.get_parameter(name).dtype == torch.float32
        assert layer.get_parameter(name)._no_weight_decay is True


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bf16_stays_near_fp32_and_keeps_an_fp32_state(how: str, device: torch.device) -> None:
    layer = MambaConfig().build(32).to(device)
    x = torch.randn(2, 40, 32, device=device)
    with torch.no_grad():
        want, _ = layer(x)
        if how == "cast":
            y, state = layer.to(torch.bfloat16)(x.bfloat16())
        else:
            with torch.autocast(device.type, torch.bfloat16):
                y, state = layer(x)
                _, state = layer(x, state)  # a bf16 conv state comes back in
                _, state = layer(x[:, :1], layer.init_state(2))  # and an fp32 one
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert_close(y, want, 2e-2)


def test_adapters_on_every_projection_are_heard() -> None:
    """A Linear wrapped with an addition changes the output: no projection's weight is read behind its
    back."""

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5

    x = torch.randn(1, 5, 16)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        layer = MambaConfig().build(16)
        with torch.no_grad():
            before = layer(x)[0]
            setattr(layer, name, Adapted(getattr(layer, name)))
            after, _ = layer(x)
            assert not torch.allclose(before, after), name
            step, _ = layer(x[:, :1], layer.init_state(1))
            assert_close(step, after[:, :1], 1e-5, name)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_single_step_with_gradients_on_a_backend_asked_for(device: torch.device, backend: str) -> None:
    """As the last of two: a segment of a longer sequence may be one step long."""
    if device.type == "cpu" and backend == "triton" and not interpreting():
        pytest.skip("needs a GPU or Triton's interpreter")
    torch.manual_seed(0)
    layer = Mamba(8, MambaConfig(d_state=4)).to(device)
    x = torch.randn(2, 2, 8, device=device)
    want = torch.autograd.grad(layer(x)[0][:, 1].square().sum(), list(layer.parameters()))
    with use_backend(backend):
        _, state = layer(x[:, :1])
        y, after = layer(x[:, 1:], state)
        found = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        with torch.no_grad():
            without, alike = layer(x[:, 1:], state)
    for (name, _), g, w in zip(layer.named_parameters(), found, want):
        assert_close(g, w, 1e-4, name)
    assert_close(without, y, OUTPUT[torch.float32], "without gradients")
    assert_close(alike.ssm, after.ssm, OUTPUT[torch.float32], "state")


def test_a_wrong_input_or_state_is_named() -> None:
    layer = MambaConfig().build(16)
    with pytest.raises(ValueError, match=r"Mamba: x has shape \(2, 3, 8\), expected \(batch, length, 16\)"):
        layer(torch.zeros(2, 3, 8))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        layer([1.0])
    with pytest.raises(StateError, match="state is a S4DState, expected MambaState"):
        layer(torch.zeros(1, 3, 16), S4DState(torch.zeros(1, 32, 4)))
    with pytest.raises(StateError, match="state has 3 rows, expected 2, one a batch entry"):
        layer(torch.zeros(2, 3, 16), layer.init_state(3))
    seqs = Sequences.from_lengths([2, 1])
    with pytest.raises(StateError, match="state has 3 rows, expected 2, one a sequence"):
        layer(torch.zeros(1, 3, 16), layer.init_state(3), seqs=seqs)
    with pytest.raises(ValueError, match="batch 2, expected 1 where seqs"):
        layer(torch.zeros(2, 3, 16), seqs=seqs)
    with pytest.raises(ValueError, match="seqs covers 3 steps, expected 4"):
        layer(torch.zeros(1, 4, 16), seqs=seqs)
    with pytest.raises(TypeError, match="seqs must be Sequences"):
        layer(torch.zeros(1, 3, 16), seqs=torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_state": 0}, "d_state is 0, expected more than 0"),
        ({"d_state": 257}, "d_state is 257, expected 1 to 256"),
        ({"d_state": 1.5}, "d_state: got 1.5, expected an integer"),
        ({"d_state": True}, "d_state: got True, expected an integer"),
        ({"dt_rank": "best"}, "dt_rank: got 'best', expected an integer or 'auto'"),
        ({"dt_min": 0.1, "dt_max": 0.01}, "dt_max is 0.01, expected at least dt_min"),
        ({"conv_bias": 1}, "conv_bias: got 1, expected true or false"),
    ],
)
def test_a_wrong_config_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MambaConfig(**values)  # type: ignore[arg-type]


def test_empty_input_hands_the_state_through() -> None:
    layer = MambaConfig().build(16)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 5, 16))
        y, after = layer(torch.zeros(2, 0, 16), state)
    assert y.shape == (2, 0, 16)
    assert torch.equal(after.conv, state.conv)
    assert torch.equal(after.ssm, state.ssm)
    assert isinstance(after, MambaState)


def test_A_is_kept_inside_and_only_inside() -> None:
    from ssm_modal.layers.mamba import keep_A

    layer = MambaConfig(d_state=4).build(8)
    x, other = torch.randn(1, 5, 8), torch.randn(layer.d_inner, 4)
    before = layer(x)[0].detach()
    with torch.no_grad(), keep_A(layer), keep_A(layer):
        assert torch.equal(layer(x)[0], before)
        kept = layer._A(torch.float32)
        assert layer._A(torch.float32) is kept
        assert layer._A(torch.float64).dtype == torch.float64
        with torch.enable_grad():
            assert layer._A(torch.float32).requires_grad
    with torch.no_grad():
        layer.A_log.copy_(other)
        assert not torch.allclose(layer(x)[0], before)

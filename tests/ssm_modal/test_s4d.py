"""The S4D layer: the laws, the convolution of the paper, initialisation, same size as Mamba."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ssm_modal
from ssm_modal.errors import ConfigError
from ssm_modal.layers import S4D, MambaConfig, S4DConfig, set_time_step_scale
from tests.ssm_modal import layer_laws as laws
from tests.tolerances import assert_close

CONFIGS = {
    "glu": S4DConfig(d_state=6),
    "gate": S4DConfig(d_state=5, output="gate", bias=False),
    "the paper's block": S4DConfig(d_state=4, expand=1, init="inv"),
}


def by_convolution(layer: S4D, x: Tensor) -> Tensor:
    """The layer by its kernel K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n)^l (section 3.2),
    summed directly."""
    length, glu = x.shape[1], layer.config.output == "glu"
    projected = x if layer.in_proj is None else layer.in_proj(x)
    u, z = (projected, None) if glu else projected.chunk(2, dim=-1)
    A = torch.complex(-torch.exp(layer.A_log), layer.A_imag)
    dtA = torch.exp(layer.log_dt)[:, None] * A
    C = torch.view_as_complex(layer.C) * (torch.exp(dtA) - 1) / A
    steps = torch.arange(length, dtype=x.dtype)
    K = 2 * (C[..., None] * torch.exp(dtA[..., None] * steps)).sum(1).real  # (d_inner, length)
    y = torch.zeros_like(u)
    for t in range(length):
        y[:, t] = (u[:, : t + 1] * K[:, : t + 1].flip(1).T).sum(1) + layer.D * u[:, t]
    if z is not None:
        return layer.out_proj(y * F.silu(z))
    value, gate = layer.out_proj(F.gelu(y)).chunk(2, dim=-1)
    return value * torch.sigmoid(gate)


@pytest.mark.parametrize("name", CONFIGS)
def test_laws(name: str, device: torch.device) -> None:
    layer = CONFIGS[name].build(12).to(device, torch.float64)
    laws.all_laws(layer, torch.float64)
    laws.reverse_equals_flip_layer_flip(layer, torch.float64)
    laws.packed_equals_separate(layer, torch.float64, reverse=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_convolution_of_the_paper(name: str) -> None:
    layer = CONFIGS[name].build(8).double()
    x = torch.randn(2, 19, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(layer(x)[0], by_convolution(layer, x), 1e-9)


def test_initialisation() -> None:
    lin, inv = S4DConfig(d_state=4).build(6), S4DConfig(d_state=4, init="inv").build(6)
    for layer in (lin, inv):
        assert_close(torch.exp(layer.A_log), torch.full((12, 4), 0.5), 1e-6)
        dt = torch.exp(layer.log_dt)
        assert dt.min() >= 0.001 * 0.999
        assert dt.max() <= 0.1 * 1.001
    assert_close(lin.A_imag[3], math.pi * torch.arange(4.0), 1e-6)
    # N = 8 of the paper: 8/pi (8 / (2n + 1) - 1)
    assert_close(inv.A_imag[3], 8 / math.pi * torch.tensor([7.0, 8 / 3 - 1, 8 / 5 - 1, 8 / 7 - 1]), 1e-6)
    C = torch.view_as_complex(S4DConfig(d_state=64).build(64).C.detach())
    assert abs(C.abs().square().mean().item() - 1) < 0.05


def test_casts_keep_the_state_space_parameters() -> None:
    layer = S4DConfig().build(8).to(torch.bfloat16)
    wide = {n for n, p in layer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "A_imag", "C", "D", "log_dt"}
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "A_imag", "D", "log_dt"}
    y, state = layer(torch.randn(1, 5, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.complex64


@pytest.mark.parametrize("output", ["glu", "gate"])
def test_as_large_as_mamba(output: str) -> None:
    """The projections are Mamba's 6 d_model^2; what differs is a few numbers a channel."""
    d = 512
    s4d = sum(p.numel() for p in S4DConfig(output=output).build(d).parameters())  # type: ignore[arg-type]
    mamba = sum(p.numel() for p in MambaConfig().build(d).parameters())
    assert abs(s4d / mamba - 1) < 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "linear"}, r"init is 'linear', expected one of 'lin', 'inv'; did you mean 'lin'"),
        ({"output": "gelu"}, "output is 'gelu', expected one of 'glu', 'gate'"),
        ({"d_state": 300}, "d_state is 300, expected 1 to 256"),
    ],
)
def test_a_wrong_config_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        S4DConfig(**values)  # type: ignore[arg-type]


def test_a_rescaled_model_hears_every_second_sample_as_the_whole() -> None:
    """A smooth signal at half the rate with twice the time step: the same system in continuous time. What is
    left is the input held for two samples instead of one, a fraction of what the wrong time step makes."""
    torch.manual_seed(0)
    model = ssm_modal.create_model("audio_classifier_s4d", d_model=8, n_layers=2, d_state=8).double()
    time = torch.arange(4000, dtype=torch.float64) / 8000
    wave = (0.3 * torch.sin(2 * math.pi * 60 * time) + 0.2 * torch.sin(2 * math.pi * 95 * time + 1))[None]
    with torch.no_grad():
        whole = model(wave)[0]
        wrong = model(wave[:, ::2])[0]
        set_time_step_scale(model, 2.0)
        right = model(wave[:, ::2])[0]
        set_time_step_scale(model, 1.0)
        again = model(wave)[0]
    assert torch.equal(again, whole)
    assert (right - whole).norm() < 0.2 * (wrong - whole).norm()
    assert (right - whole).norm() < 0.05 * whole.norm()


def test_only_s4d_over_single_samples_can_be_rescaled() -> None:
    for name in ("audio_classifier", "mamba_lm"):
        model = ssm_modal.create_model(name, d_model=8, n_layers=1)
        with pytest.raises(ValueError, match=r"the model has .*Mamba.*, expected S4D layers alone"):
            set_time_step_scale(model, 2.0)
    model = ssm_modal.create_model("audio_classifier_s4d", d_model=8, n_layers=1)
    with pytest.raises(ValueError, match="scale is 0, expected more than 0"):
        set_time_step_scale(model, 0)

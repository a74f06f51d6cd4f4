"""The learned filterbank: what its first filters hear, packed and chunked, half precision, configs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ssm_modal.errors import ConfigError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import FilterbankConfig
from ssm_modal.layers.filterbank import mel_gabor_filters


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def test_the_first_filters_hear_tones_where_the_mel_scale_says() -> None:
    """A tone at a filter's centre has there the energy of its amplitude squared, and is heard less by the
    others."""
    config = FilterbankConfig(n_filters=20)
    real, imaginary = mel_gabor_filters(config).double().chunk(2)
    low, high = mel(0.015 * 4000), mel(0.95 * 4000)
    time = torch.arange(config.kernel, dtype=torch.float64) / 8000
    for i in range(4, 20):  # lower ones are as narrow as the kernel allows, and hear the tone's mirror image
        hertz = 700 * (10 ** ((low + (high - low) * (i + 1) / 21) / 2595) - 1)
        tone = 0.3 * torch.cos(2 * math.pi * hertz * time + 1.0)
        energy = (real @ tone).square() + (imaginary @ tone).square()
        assert float(energy[i]) == pytest.approx(0.09, rel=0.02)
        assert int(energy.argmax()) == i
        assert float(energy[i + 1 :].sum() + energy[: max(0, i - 3)].sum()) < 0.1 * float(energy[i])


def test_the_layer_is_its_formula_and_does_not_see_how_sequences_are_packed() -> None:
    torch.manual_seed(0)
    config = FilterbankConfig(n_filters=6, kernel=20, window=32, stride=8, pool_stride=4)
    assert config.pool_positions == 4
    layer = config.build(5).double()
    waves = [0.3 * torch.randn(1, n, dtype=torch.float64) for n in (50, 8, 1, 33)]
    alone = []
    for wave in waves:
        out, _, _ = layer(wave)
        assert out.shape == (1, -(-wave.shape[1] // 8), 5)
        padded = torch.cat([torch.zeros(31, dtype=torch.float64), wave[0]])
        windows = torch.stack([padded[8 * i : 8 * i + 32] for i in range(out.shape[1])])
        heard = torch.stack([windows[:, 4 * p : 4 * p + 20] for p in range(4)], 1)
        re, im = (heard @ layer.conv.weight.T).chunk(2, -1)
        weights = torch.tensor([math.sin(math.pi * (p + 1) / 5) ** 2 for p in range(4)], dtype=torch.float64)
        power = ((re.square() + im.square()) * (weights / weights.sum())[:, None]).sum(1)
        expected = layer.proj(0.25 * (torch.log(power + 1e-6) - math.log(1e-6) / 2))
        torch.testing.assert_close(out[0], expected)
        alone.append(out[0])
    seqs = Sequences.from_lengths([w.shape[1] for w in waves])
    packed, steps, _ = layer(torch.cat(waves, 1), seqs=seqs)
    assert steps is not None
    assert list(steps.lengths) == [7, 1, 1, 5]
    torch.testing.assert_close(packed[0], torch.cat(alone))


def test_silence_is_finite_and_has_finite_gradients() -> None:
    layer = FilterbankConfig(n_filters=4, kernel=16, window=32, stride=8).build(3)
    out, _, _ = layer(torch.zeros(1, 40))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 79, "kernel": 79}, "window is 79, expected at least stride, 80"),
        ({"window": 250}, "window is 250, .* plus a multiple of pool_stride, 16"),
        ({"low": 0.5, "high": 0.4}, "high is 0.4, expected more than low, 0.5"),
        ({"n_filters": 0}, "n_filters is 0"),
        ({"floor": 0.0}, "floor is 0.0"),
    ],
)
def test_a_wrong_config_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterbankConfig(**values)

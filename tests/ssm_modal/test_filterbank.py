"""The learned filterbank: what its first filters hear, packed, normalised, masked, configs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import FilterbankConfig, SpecAugmentConfig
from ssm_modal.layers.filterbank import FilterbankInput, mel_gabor_filters
from ssm_modal.layers.spec_augment import spec_masks
from ssm_modal.models import model_config


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


SMALL = FilterbankConfig(n_filters=6, kernel=20, window=32, stride=8, pool_stride=4)


def powers(layer: FilterbankInput, wave: torch.Tensor) -> torch.Tensor:
    """(steps, n_filters) of a waveform (1, n) by the formula."""
    config = layer.filterbank
    padded = torch.cat([torch.zeros(config.window - 1, dtype=wave.dtype), wave[0]])
    heard = padded.unfold(0, config.window, config.stride).unfold(1, config.kernel, config.pool_stride)
    re, im = (heard @ layer.conv.weight.T).chunk(2, -1)
    return ((re.square() + im.square()) * layer.pool.softmax(1).T).sum(1)


def test_normalized_energies_are_those_of_each_recording_alone() -> None:
    """By hand, and a packed recording does not hear its neighbours; gradients go through level and mean."""
    torch.manual_seed(0)
    layer = replace(SMALL, normalize="mean", floor=1e-3).build(5).double()
    assert layer.offset is None
    waves = [0.3 * torch.randn(1, n, dtype=torch.float64) for n in (50, 8, 0, 33)]
    alone = []
    for wave in waves:
        power = powers(layer, wave) if wave.shape[1] else torch.zeros(0, 6, dtype=torch.float64)
        g = power.prod(-1) ** (1 / 6)
        level = g.square().sum() / g.sum()
        energy = torch.log(power / level + 1e-3)
        w = g / (g + 0.01 * level)
        mean = (w[:, None] * energy).sum(0) / w.sum()
        out, _, _ = layer(wave)
        torch.testing.assert_close(out[0], layer.proj(0.25 * (energy - mean)))
        alone.append(out[0])
    packed, steps, _ = layer(torch.cat(waves, 1), seqs=Sequences.from_lengths([w.shape[1] for w in waves]))
    assert steps is not None
    assert list(steps.lengths) == [7, 1, 0, 5]
    torch.testing.assert_close(packed[0], torch.cat(alone))
    rows = torch.cat([waves[0], 0.1 * waves[0].flip(1)])  # not packed, each by its own
    torch.testing.assert_close(layer(rows)[0], torch.cat([layer(rows[:1])[0], layer(rows[1:])[0]]))
    short = waves[3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (short,), atol=1e-4)


def test_loudness_changes_nothing_and_silence_and_a_microphone_nearly_nothing() -> None:
    torch.manual_seed(0)
    config = FilterbankConfig(n_filters=8, kernel=32, window=80, normalize="mean", floor=1e-3)
    layer = config.build(4).double()
    wave = 0.1 * torch.randn(1, 1200, dtype=torch.float64)
    out, _, _ = layer(wave)
    torch.testing.assert_close(layer(0.01 * wave)[0], out, rtol=0, atol=1e-4)
    plain = replace(config, normalize="none", floor=1e-6).build(4).double()
    assert float((plain(0.01 * wave)[0] - plain(wave)[0]).abs().mean()) > 0.1
    # Ten times as much silence as speech, faintly noisy: 60 dB below.
    silence = 1e-4 * torch.randn(1, 6400, dtype=torch.float64)
    padded, _, _ = layer(torch.cat([silence, wave, silence], 1))
    assert float((padded[:, 80:95] - out).abs().max()) < 0.02
    # Another filter in front of the recording is another level of each band.
    tilted = replace(config, floor=1e-12).build(4).double()
    tilted.load_state_dict(layer.state_dict())
    before, _, _ = tilted(wave)
    with torch.no_grad():
        tilted.conv.weight.mul_(torch.logspace(-1, 1, 8, dtype=torch.float64).repeat(2)[:, None])
    torch.testing.assert_close(tilted(wave)[0], before, rtol=0, atol=1e-4)


def test_silence_alone_is_finite_when_normalized() -> None:
    layer = replace(SMALL, normalize="mean").build(3)
    out, _, _ = layer(torch.zeros(1, 40))
    torch.testing.assert_close(out, layer.proj.bias.expand_as(out))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_normalization_needs_the_whole_recording() -> None:
    layer = FilterbankConfig(normalize="mean").build(4)
    with pytest.raises(StateError, match="normalize is 'mean', which needs the whole recording"):
        layer(torch.zeros(1, 100), layer.init_state(1))
    config = model_config("audio_classifier_filterbank")
    assert config.to_dict()["input"]["normalize"] == "mean"
    with pytest.raises(ConfigError, match=r"input\.normalize is set with a causal backbone"):
        config.with_overrides({"bidirectional": None}).build()


def test_masks_cover_bands_and_stretches_of_each_sequence_as_often_as_they_say() -> None:
    """Widths 0 to the greatest, equally often; a stretch never longer than its share of the sequence."""
    torch.manual_seed(0)
    n, filters = 400, 12
    rows = Sequences.from_lengths([20, 1, 6, 0] * n)
    bands_only = SpecAugmentConfig(frequency_masks=1, frequency_width=3, time_masks=0)
    stretches_only = SpecAugmentConfig(frequency_masks=0, time_masks=1, time_width=4, time_share=0.34)
    bands = spec_masks(bands_only, rows, filters)
    widths = []
    for piece in bands.split(list(rows.lengths)):
        assert (piece == piece[:1]).all()
        widths += [int(piece[0].sum())] if len(piece) else []
        assert not len(piece) or int(piece[0].int().diff().abs().sum()) <= 2  # one run of neighbours
    counts = torch.bincount(torch.tensor(widths), minlength=4)
    assert counts.shape == (4,)
    assert (counts / len(widths) - 0.25).abs().max() < 0.05
    assert bands.any(0).all()  # no filter is out of reach
    stretches = spec_masks(stretches_only, rows, filters)
    assert (stretches == stretches[:, :1]).all()
    by_length: dict[int, set[int]] = {}
    for piece in stretches[:, 0].split(list(rows.lengths)):
        assert int(piece.int().diff().abs().sum()) <= 2
        by_length.setdefault(len(piece), set()).add(int(piece.sum()))
    assert by_length == {20: {0, 1, 2, 3, 4}, 1: {0}, 6: {0, 1, 2}, 0: {0}}
    starts = [int(p.int().argmax()) for p in stretches[:, 0].split(list(rows.lengths)) if p.any()]
    assert {min(starts), max(starts)} == {0, 19}


@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_masked_values_are_the_mean_of_their_sequence_in_training_alone(normalize: Any) -> None:
    plain = replace(SMALL, normalize=normalize).build(6)
    masks = SpecAugmentConfig(frequency_width=3, time_width=3)
    masked = replace(SMALL, normalize=normalize, spec_augment=masks).build(6)
    with torch.no_grad():
        for layer in (masked, plain):
            layer.proj.weight.copy_(torch.eye(6))
            layer.proj.bias.zero_()
    wave = 0.3 * torch.randn(1, 600)
    seqs = Sequences.from_lengths([240, 360])
    expected = plain(wave, seqs=seqs)[0][0]
    torch.manual_seed(3)
    out = masked(wave, seqs=seqs)[0][0]
    assert torch.equal(masked.eval()(wave, seqs=seqs)[0][0], expected)
    changed = out != expected
    assert 0 < int(changed.sum()) < changed.numel()
    means = torch.cat([p.mean(0).expand_as(p) for p in expected.split([30, 45])])
    torch.testing.assert_close(out[changed], means[changed], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_masks": -1}, "time_masks is -1, expected 0 or more"),
        ({"time_share": 1.5}, "time_share is 1.5, expected 0 to 1"),
    ],
)
def test_a_wrong_config_of_masks_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpecAugmentConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 79, "kernel": 79}, "window is 79, expected at least stride, 80"),
        ({"window": 250}, "window is 250, .* plus a multiple of pool_stride, 16"),
        ({"low": 0.5, "high": 0.4}, "high is 0.4, expected more than low, 0.5"),
        ({"n_filters": 0}, "n_filters is 0"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"normalize": "max"}, "normalize"),
    ],
)
def test_a_wrong_config_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterbankConfig(**values)

"""The convolutional baseline: against plain torch, packed against one by one, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ssm_modal
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.models import WaveformCNN, model_config

SMALL: dict[str, Any] = {
    "n_classes": 3,
    "channels": [4, 6],
    "kernels": [9, 5],
    "strides": [4, 2],
    "dropout": 0.0,
}


def small() -> WaveformCNN:
    torch.manual_seed(0)
    model = ssm_modal.create_model("waveform_cnn", **SMALL)
    assert isinstance(model, WaveformCNN)
    return model.double()


def test_one_recording_is_plain_convolutions() -> None:
    model = small()
    wave = torch.randn(2, 57, dtype=torch.float64)
    hidden = 8.0 * wave[:, None]
    for conv, stride in zip(model.convs, (4, 2)):
        weight = conv.weight
        assert isinstance(weight, torch.Tensor)
        hidden = F.conv1d(hidden, weight, stride=stride, padding=weight.shape[2] // 2)
        hidden = F.relu(F.batch_norm(hidden, None, None, training=True))
    expected = model.proj(hidden.mean(2))
    torch.testing.assert_close(model(wave)[0], expected)


def test_packed_recordings_are_separate_ones_and_padding_is_not_normed() -> None:
    model = small()
    waves = [torch.randn(n, dtype=torch.float64) for n in (57, 8, 1, 30)]
    seqs = Sequences.from_lengths([w.shape[0] for w in waves])
    # In training the norms see the steps of all recordings, and no more: 15 + 2 + 1 + 8 of the first.
    model(torch.cat(waves)[None], seqs=seqs)
    weight = model.convs[0].weight
    assert isinstance(weight, torch.Tensor)
    steps = torch.cat([F.conv1d(8 * w[None, None], weight, stride=4, padding=4)[0].T for w in waves])
    assert steps.shape[0] == 26
    norm = model.norms[0]
    torch.testing.assert_close(norm.running_mean, 0.1 * steps.mean(0))
    model.eval()
    packed = model(torch.cat(waves)[None], seqs=seqs)[0]
    alone = torch.cat([model(w[None])[0] for w in waves])
    torch.testing.assert_close(packed, alone)
    empty = model(torch.zeros(1, 0, dtype=torch.float64))[0]
    torch.testing.assert_close(empty, model.proj.bias[None])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = small().eval()
    model.save_pretrained(tmp_path)
    wave = torch.randn(1, 40, dtype=torch.float64)
    assert torch.equal(ssm_modal.load_pretrained(tmp_path)(wave)[0], model(wave)[0])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="have 2, 1 and 2 entries"):
        model_config("waveform_cnn", **{**SMALL, "kernels": [9]})
    with pytest.raises(ConfigError, match=r"kernels\.1 is 4, expected an odd number"):
        model_config("waveform_cnn", **{**SMALL, "kernels": [9, 4]})
    with pytest.raises(ConfigError, match=r"strides\.0 is 0"):
        model_config("waveform_cnn", **{**SMALL, "strides": [0, 2]})
    model = small()
    with pytest.raises(TypeError, match="expected a floating one"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(StateError, match="needs whole recordings"):
        model(torch.zeros(1, 4), "state")
    with pytest.raises(ValueError, match="x has batch 2, expected 1 with seqs"):
        model(torch.zeros(2, 4), seqs=Sequences.from_lengths([4]))

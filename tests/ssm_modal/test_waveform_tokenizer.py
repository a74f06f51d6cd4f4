"""Mu-law ids: torchaudio's, at a fixed scale, and the ids for begin and end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssm_modal.tokenizers.waveform import MuLawTokenizer


def test_ids_are_torchaudios_for_every_16_bit_sample() -> None:
    functional = pytest.importorskip("torchaudio.functional")
    wave = torch.arange(-(2**15), 2**15, dtype=torch.float32) / 2**15
    ids = MuLawTokenizer().encode(wave)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, functional.mu_law_encoding(wave, 256))
    # The place in the tensor (vectorised or not) does not decide on which side of a border a sample falls.
    for offset in (1, 3, 7):
        assert torch.equal(MuLawTokenizer().encode(wave[offset:]), ids[offset:])
    decoded = MuLawTokenizer().decode(torch.arange(256))
    torch.testing.assert_close(decoded, functional.mu_law_decoding(torch.arange(256), 256))


def test_the_scale_is_fixed_and_decoding_is_its_inverse() -> None:
    tokenizer = MuLawTokenizer()
    given = torch.tensor([[-1.0, 0.0, 1.0], [1e-4, -1e-4, 0.5]])
    assert tokenizer.encode(given).tolist() == [[0, 128, 255], [128, 127, 239]]
    assert tokenizer.encode(torch.tensor([-7.0, 1.5])).tolist() == [0, 255]
    ids = torch.arange(256)
    assert torch.equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    wave = torch.rand(10_000) * 2 - 1
    back = tokenizer.decode(tokenizer.encode(wave))
    # Half a step of the companded domain, (1 + 255 |x|) ln 256 / 255 of the sample's.
    step = (1 + 255 * wave.abs()) * 5.545 / 255 / 255
    assert ((back - wave).abs() <= 1.02 * step).all()


def test_begin_and_end_stand_beyond_the_levels() -> None:
    tokenizer = MuLawTokenizer()
    assert (tokenizer.vocab_size, tokenizer.begin_id, tokenizer.end_id, tokenizer.eos_id) == (
        258,
        256,
        257,
        257,
    )
    ids = tokenizer.encode_recording(torch.tensor([0.0, 1.0]))
    assert ids.tolist() == [256, 128, 255, 257]
    assert tokenizer.decode(ids).shape == (2,)
    assert tokenizer.decode([256, 257]).shape == (0,)
    assert tokenizer.check_ids(ids) == [256, 128, 255, 257]


def test_configs_and_errors(tmp_path: Path) -> None:
    tokenizer = MuLawTokenizer()
    config = json.loads(tokenizer.save(tmp_path / "t.json").read_text())
    assert MuLawTokenizer.from_config(config).fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ValueError, match=r"expected .*'mu_law'"):
        MuLawTokenizer.from_config({**config, "levels": 16})
    for ids in ([0, 258], [0, -1]):
        for function in (tokenizer.decode, tokenizer.check_ids):
            with pytest.raises(ValueError, match=rf"ids\[1\] is {ids[1]}, expected 0 to 257"):
                function(ids)
    with pytest.raises(TypeError, match=r"ids is torch\.float32"):
        tokenizer.decode(torch.tensor([0.5]))
    with pytest.raises(TypeError, match=r"waveform is torch\.int16, expected a floating dtype"):
        tokenizer.encode(torch.tensor([1], dtype=torch.int16))
    with pytest.raises(ValueError, match="waveform holds NaN"):
        tokenizer.encode(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"waveform has the shape \(1, 2\)"):
        tokenizer.encode_recording(torch.zeros(1, 2))

"""Log-mel spectrograms, by torchaudio."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Added to the power before the logarithm: -60 dB beside a tone at full scale in one band and window.
_FLOOR = 1e-6


def log_mel(
    waveform: Tensor, sample_rate: int, *, n_mels: int = 40, window: float = 0.032, hop: float = 0.010
) -> Tensor:
    """The natural logarithm of 1e-6 plus the power in `n_mels` mel bands: (n_mels, frames) float32.

    waveform: (n,) floating, full scale being 1, n at least 1. window, hop: seconds; frames are centred on
    every hop, with zeros beyond both ends, so there are n // hop + 1 of them. Windows are Hann's, bands HTK's
    from 0 to half the sample rate. The power of a window is divided by the square of the window's sum, so
    that a tone at full scale has about 1/4 whatever the window.
    """
    if waveform.dim() != 1 or waveform.numel() == 0 or not waveform.is_floating_point():
        raise ValueError(
            f"waveform is {tuple(waveform.shape)} of {waveform.dtype}, expected (n,) of a floating dtype, "
            "at least one sample"
        )
    length, step = max(1, round(window * sample_rate)), max(1, round(hop * sample_rate))
    transform = _transform(sample_rate, n_mels, length, step)
    power = transform(waveform.detach().cpu().float())
    return torch.log(power / torch.hann_window(length).sum() ** 2 + _FLOOR)


@lru_cache(maxsize=8)
def _transform(sample_rate: int, n_mels: int, length: int, step: int) -> Any:
    try:
        from torchaudio.transforms import MelSpectrogram
    except (ImportError, OSError) as error:
        raise ImportError("spectrograms need torchaudio: pip install 'ssm-modal[audio]'") from error
    return MelSpectrogram(
        sample_rate, n_fft=length, hop_length=step, n_mels=n_mels, power=2.0, pad_mode="constant"
    )

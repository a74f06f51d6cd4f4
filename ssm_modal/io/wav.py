"""Writing WAV files, whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.audio import load_soundfile

Subtype = Literal["PCM_16", "PCM_24", "FLOAT"]


def write_wav(
    path: str | os.PathLike[str], waveform: Tensor, sample_rate: int, subtype: Subtype = "PCM_16"
) -> Path:
    """Write `waveform`, (frames,) or (frames, channels) of a floating dtype, to the WAV file `path`.

    The scale is `read_audio`'s: 16-bit PCM is x * 32768, 24-bit PCM x * 2^23, both rounded and clipped to
    what they hold (from -1 to just below 1), "FLOAT" x itself in 32 bits; what was read comes back as it was.
    A reader finds the old file or the whole new one. Raises TypeError or ValueError for a waveform of another
    shape or dtype, without a frame, or with a NaN or infinite sample, and OSError when the disk is full.
    """
    soundfile = load_soundfile()
    if not waveform.is_floating_point():
        raise TypeError(f"waveform is {waveform.dtype}, expected a floating dtype")
    if waveform.dim() not in (1, 2) or waveform.numel() == 0:
        raise ValueError(
            f"waveform has the shape {tuple(waveform.shape)}, expected (frames,) or (frames, channels), "
            "at least one of each"
        )
    if sample_rate < 1:
        raise ValueError(f"sample_rate is {sample_rate}, expected 1 or more frames a second")
    wave = waveform.detach().cpu()
    if not torch.isfinite(wave).all():
        raise ValueError("waveform holds NaN or infinite samples, expected finite numbers")
    if subtype == "PCM_16":
        data = (wave.double() * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    elif subtype == "PCM_24":
        # libsndfile takes 24 bits as the upper ones of 32.
        data = (wave.double() * 2**23).round().clamp(-(2**23), 2**23 - 1).to(torch.int32) * 256
    elif subtype == "FLOAT":
        data = wave.float()
    else:
        raise ValueError(f'subtype is {subtype!r}, expected "PCM_16", "PCM_24" or "FLOAT"')
    buffer = io.BytesIO()
    soundfile.write(buffer, data.numpy(), sample_rate, subtype=subtype, format="WAV")
    return atomic_write(path, buffer.getvalue())

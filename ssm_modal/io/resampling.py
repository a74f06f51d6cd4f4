"""Windows of a resampled signal, read without the rest of it.

torchaudio's filter (Hann-windowed sinc) reaches a fixed number of frames to either side, and repeats after
`source` input and `target` output frames, the rates divided by their greatest common divisor. A window is
resampled from the blocks it touches and the neighbours the filter reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Zero crossings of the sinc on either side, and where the low-pass ends as a part of the lower Nyquist rate.
_CROSSINGS = 6
_ROLLOFF = 0.99
# Output frames made at once: bounds the memory, and torchaudio counts frames in float32, inexact for many.
_PIECE = 1 << 18
# Coefficients a filter may have: 2^26 are 256 MiB.
_MAX_FILTER = 1 << 26


def resampled_frames(frames: int, source_rate: int, target_rate: int) -> int:
    """Frames that `frames` at `source_rate` become at `target_rate`, rounded up."""
    return -(-frames * target_rate // source_rate)


def read_resampled(
    read: Callable[[int, int], Tensor],
    frames: int,
    source_rate: int,
    target_rate: int,
    start: int,
    stop: int,
    *,
    channels: int,
) -> Tensor:
    """Frames [start, stop) of a signal resampled to `target_rate`: (stop - start, channels) float32.

    read: (first, last) to input frames [first, last), (last - first, channels) float32; it is called with
        places inside the signal alone, outside of which all is 0.
    frames: of the whole signal at `source_rate`.

    Raises ValueError for two rates whose common filter would not fit in memory.
    """
    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    reach = math.ceil(_CROSSINGS * source / (min(source, target) * _ROLLOFF))
    if target * (source + 2 * reach) > _MAX_FILTER:
        raise ValueError(
            f"resampling from {source_rate} to {target_rate} Hz would need a filter of "
            f"{target * (source + 2 * reach)} coefficients, expected rates with a larger common divisor"
        )
    margin = -(-reach // source)
    out = torch.empty(stop - start, channels)
    for at in range(start, stop, _PIECE):
        end = min(at + _PIECE, stop)
        begin = max(0, at // target - margin)
        first, last = begin * source, (-(-end // target) + margin) * source
        wave = torch.zeros(last - first, channels)
        inside = min(last, frames)
        wave[: inside - first] = read(first, inside)
        made = _resampler(source, target)(wave.T.contiguous())
        out[at - start : end - start] = made[:, at - begin * target : end - begin * target].T
    return out


@lru_cache(maxsize=8)
def _resampler(source: int, target: int) -> Any:
    try:
        from torchaudio.transforms import Resample
    except ImportError as error:
        raise ImportError("resampling needs torchaudio: pip install 'ssm-modal[audio]'") from error
    return Resample(source, target, lowpass_filter_width=_CROSSINGS, rolloff=_ROLLOFF)

"""Augmentation of training waveforms: each draw comes from the generator given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Speeds are multiples of 1 / _SPEED_STEPS: the resampler is slow for ratios of large numbers.
_SPEED_STEPS = 50
_LIMITS = ("shift_seconds", "pad_seconds", "reverb_seconds", "equalize_db", "gain_db", "mask_seconds")
_BANDS = 2  # that `equalize_db` raises or lowers


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training recording, in the order below; every default does nothing.

    speed: resampled to play so many times as fast, uniformly between the two factors, in steps of 0.02. Pitch
        and formants move with it, as with another length of the vocal tract, and so does the duration: the
        recording has n / speed samples.
    shift_seconds: moved by up to so much to either side, uniformly; the length stays, what is moved out is
        lost and the other end is filled with 0.
    pad_seconds: with a probability of one half up to so many seconds of zeros before it, uniformly, and up to
        as many behind it: the recording is longer by them.
    reverb_seconds: with a probability of one half heard in a room: convolved with an impulse and a tail of
        Gaussian noise behind it that decays by 60 dB in a time drawn uniformly up to so much, of an energy
        0 to 20 dB below the impulse's, uniformly. The length stays.
    equalize_db: two bands, at frequencies drawn log-uniformly up to 0.9 of half the rate and of a Q from 0.5
        to 2, louder or softer by up to so many decibels, uniformly: another microphone or room.
    gain_db: louder or softer by up to so many decibels, uniformly.
    noise_snr_db: Gaussian noise at a signal-to-noise ratio drawn uniformly between the two decibels.
    noise_slope_db: the noise's power falls by so many decibels an octave, drawn uniformly between the two: 0
        is white, 3 pink, 6 brown noise. With `noise_snr_db` alone.
    mask_seconds: a stretch of up to so much, uniformly in length and place, set to 0.

    The result is clipped to full scale, -1 to 1. Raises ValueError for a value that is not allowed.
    """

    shift_seconds: float = 0.0
    gain_db: float = 0.0
    noise_snr_db: tuple[float, float] | None = None
    speed: tuple[float, float] | None = None
    equalize_db: float = 0.0
    mask_seconds: float = 0.0
    pad_seconds: float = 0.0
    reverb_seconds: float = 0.0
    noise_slope_db: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in _LIMITS:
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if self.speed is not None:
            low, high = self.speed
            if not 0.1 <= low <= high <= 10.0:
                raise ValueError(
                    f"speed is {self.speed}, expected the lower, then the higher factor, 0.1 to 10"
                )
        if self.noise_snr_db is not None:
            low, high = self.noise_snr_db
            if not -float("inf") < low <= high < float("inf"):
                raise ValueError(
                    f"noise_snr_db is {self.noise_snr_db}, expected the lower, then the higher ratio"
                )
        low, high = self.noise_slope_db
        if not -float("inf") < low <= high < float("inf"):
            raise ValueError(
                f"noise_slope_db is {self.noise_slope_db}, expected the lower, then the higher slope"
            )
        if (low, high) != (0.0, 0.0) and self.noise_snr_db is None:
            raise ValueError(f"noise_slope_db is {self.noise_slope_db} without noise_snr_db, its level")

    @property
    def keeps_place(self) -> bool:
        """Whether a sample stays where it was."""
        return self.speed is None and self.shift_seconds == 0 and self.pad_seconds == 0

    def __call__(self, wave: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        """The augmented `wave`, (n,) float32 at `sample_rate`; a new tensor, the given one is left alone."""
        from torchaudio.functional import add_noise, equalizer_biquad, fftconvolve, gain, resample

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator).item()

        out = wave.clone()
        if self.speed is not None:
            factor = max(1, round(uniform(*self.speed) * _SPEED_STEPS))
            if factor != _SPEED_STEPS:
                out = resample(out, factor, _SPEED_STEPS)
        reach = min(round(self.shift_seconds * sample_rate), out.shape[0] - 1)
        if reach > 0:
            by = int(torch.randint(-reach, reach + 1, (), generator=generator))
            out = torch.roll(out, by)
            if by > 0:
                out[:by] = 0.0
            elif by < 0:
                out[by:] = 0.0
        if self.pad_seconds > 0 and uniform(0.0, 1.0) < 0.5:
            before, after = (round(uniform(0.0, self.pad_seconds) * sample_rate) for _ in range(2))
            out = F.pad(out, (before, after))
        if self.reverb_seconds > 0 and uniform(0.0, 1.0) < 0.5:
            room = _room(uniform(0.0, self.reverb_seconds), uniform(0.0, 20.0), sample_rate, generator)
            out = fftconvolve(out, room)[: out.shape[0]]
        if self.equalize_db > 0:
            for _ in range(_BANDS):
                centre = math.exp(uniform(math.log(60.0), math.log(0.45 * sample_rate)))
                level, q = uniform(-self.equalize_db, self.equalize_db), uniform(0.5, 2.0)
                out = equalizer_biquad(out, sample_rate, centre, level, q)
        if self.gain_db > 0:
            out = gain(out, uniform(-self.gain_db, self.gain_db))
        if self.noise_snr_db is not None:
            ratio = torch.tensor(uniform(*self.noise_snr_db))
            noise = torch.randn(out.shape, generator=generator)
            if self.noise_slope_db != (0.0, 0.0):
                noise = _sloped(noise, uniform(*self.noise_slope_db))
            out = add_noise(out, noise, ratio)
        if self.mask_seconds > 0:
            length = min(round(uniform(0.0, self.mask_seconds) * sample_rate), out.shape[0] - 1)
            first = int(torch.randint(0, out.shape[0] - length, (), generator=generator))
            out[first : first + length] = 0.0
        return out.clamp(-1.0, 1.0)


def _room(decay: float, level: float, sample_rate: int, generator: torch.Generator) -> Tensor:
    """An impulse response, (1 + n,): 1, then noise that falls by 60 dB in `decay` seconds, of an energy
    `level` dB below that of the impulse."""
    n = round(decay * sample_rate)
    if n == 0:
        return torch.ones(1)
    tail = torch.randn(n, generator=generator) * 10.0 ** (-3.0 * torch.arange(1, n + 1) / n)
    tail = tail * (10.0 ** (-level / 20) / tail.norm())
    return torch.cat([torch.ones(1), tail])


def _sloped(noise: Tensor, slope_db: float) -> Tensor:
    """White noise (n,) to noise the power of which falls by `slope_db` an octave."""
    spectrum = torch.fft.rfft(noise)
    octave = torch.log2(torch.arange(spectrum.shape[0]).clamp(min=1))  # above bin 1; bin 0 as loud as that
    return torch.fft.irfft(spectrum * 10.0 ** (-slope_db * octave / 20), noise.shape[0])

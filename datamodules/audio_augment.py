"""Augmentation of training waveforms: time shift, gain and noise, each draw from the generator given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training recording, in this order; every default does nothing.

    shift_seconds: moved by up to so much to either side, uniformly; the length stays, what is moved out is
        lost and the other end is filled with 0.
    gain_db: louder or softer by up to so many decibels, uniformly.
    noise_snr_db: white Gaussian noise at a signal-to-noise ratio drawn uniformly between the two decibels.

    The result is clipped to full scale, -1 to 1. Raises ValueError for a value that is not allowed.
    """

    shift_seconds: float = 0.0
    gain_db: float = 0.0
    noise_snr_db: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("shift_seconds", self.shift_seconds), ("gain_db", self.gain_db)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if self.noise_snr_db is not None:
            low, high = self.noise_snr_db
            if not -float("inf") < low <= high < float("inf"):
                raise ValueError(
                    f"noise_snr_db is {self.noise_snr_db}, expected the lower, then the higher ratio"
                )

    def __call__(self, wave: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        """The augmented `wave`, (n,) float32 at `sample_rate`; a new tensor, the given one is left alone."""
        from torchaudio.functional import add_noise, gain

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator).item()

        out = wave.clone()
        reach = min(round(self.shift_seconds * sample_rate), wave.shape[0] - 1)
        if reach > 0:
            by = int(torch.randint(-reach, reach + 1, (), generator=generator))
            out = torch.roll(out, by)
            if by > 0:
                out[:by] = 0.0
            elif by < 0:
                out[by:] = 0.0
        if self.gain_db > 0:
            out = gain(out, uniform(-self.gain_db, self.gain_db))
        if self.noise_snr_db is not None:
            ratio = torch.tensor(uniform(*self.noise_snr_db))
            out = add_noise(out, torch.randn(out.shape, generator=generator), ratio)
        return out.clamp(-1.0, 1.0)

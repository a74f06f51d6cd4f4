"""Learned filterbanks: a waveform to the log energies of complex band filters, then to vectors.

Zeghidour et al., "Learning Filterbanks from Raw Speech for Phone Recognition", arXiv 1711.01161, and LEAF,
arXiv 2101.08596: the filters are weights, which start as Gabor filters spaced on the mel scale; their squared
moduli are smoothed over a window, so that the first outputs are close to a log-mel spectrogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssm_modal.errors import ConfigError
from ssm_modal.kernels.checks import state_dtype
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import InputConfig, StridedWaveformConfig, StridedWaveformInput


@dataclass(frozen=True)
class FilterbankConfig(InputConfig):
    """n_filters complex filters of `kernel` samples, each heard at every `pool_stride`-th sample of a window
    of `window`; a window at every `stride`-th sample, causal as `StridedWaveformConfig` is: n samples give
    ceil(n / stride) vectors, vector i reading samples i * stride - window + 1 to i * stride.

        e_i = log(sum_p w_ip |filter_i * x|_p^2 + floor)        vector = Linear(gain_i * (e_i - offset_i))

    The smoothing w (positive, of sum one, a Hann window at the start), gain and offset are weights, one each
    a filter. floor: keeps silence finite; energies are those of samples from -1 to 1, filters of unit gain.
    low, high: where the filters' centres start, as parts of half the sample rate, equally far apart in mel at
    `mel_rate` samples a second.
    """

    type: ClassVar[str] = "filterbank"
    n_filters: int = 32
    kernel: int = 128
    window: int = 256
    stride: int = 80
    pool_stride: int = 16
    floor: float = 1e-6
    low: float = 0.015
    high: float = 0.95
    mel_rate: int = 8000

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "FilterbankConfig"
        check_positive(name, n_filters=self.n_filters, kernel=self.kernel, stride=self.stride)
        check_positive(name, floor=self.floor, low=self.low, mel_rate=self.mel_rate)
        check_positive(name, pool_stride=self.pool_stride)
        if not self.low < self.high <= 1:
            raise ConfigError(f"{name}: high is {self.high}, expected more than low, {self.low}, up to 1")
        if self.window < max(self.stride, self.kernel) or (self.window - self.kernel) % self.pool_stride:
            raise ConfigError(
                f"{name}: window is {self.window}, expected at least stride, {self.stride}, and kernel, "
                f"{self.kernel}, plus a multiple of pool_stride, {self.pool_stride}"
            )

    @property
    def pool_positions(self) -> int:
        """How often each filter is heard in a window."""
        return (self.window - self.kernel) // self.pool_stride + 1

    def build(self, d_model: int) -> FilterbankInput:
        return FilterbankInput(d_model, self)


class FilterbankInput(StridedWaveformInput):
    """waveform (batch, length) of a floating dtype to (batch, ceil(length / stride), d_model).

    Parameters: conv (kernel -> 2 n_filters: the real parts, then the imaginary ones), pool (n_filters,
    pool_positions: the logarithm of the smoothing, up to its sum), gain and offset (n_filters,), proj
    (n_filters -> d_model). Carries a `StridedState`.
    """

    def __init__(self, d_model: int, config: FilterbankConfig) -> None:
        super().__init__(d_model, StridedWaveformConfig(config.window, config.stride))
        self.filterbank = config
        self.conv = nn.Linear(config.kernel, 2 * config.n_filters, bias=False)
        self.proj = nn.Linear(config.n_filters, d_model)
        hann = torch.hann_window(config.pool_positions + 2, periodic=False)[1:-1]
        self.pool = nn.Parameter(hann.log().expand(config.n_filters, -1).clone())
        # Log energies of speech lie some log units around the middle between the floor and a loud sound.
        self.gain = nn.Parameter(torch.full((config.n_filters,), 0.25))
        self.offset = nn.Parameter(torch.full((config.n_filters,), math.log(config.floor) / 2))
        with torch.no_grad():
            self.conv.weight.copy_(mel_gabor_filters(config))

    def _embed(self, windows: Tensor) -> Tensor:
        config = self.filterbank
        heard = windows.to(self.conv.weight.dtype).unfold(-1, config.kernel, config.pool_stride)
        real, imaginary = self.conv(heard).chunk(2, dim=-1)  # (..., positions, n_filters) each
        # Sums of small squares and their logarithm need more digits than half precision has.
        wide = state_dtype(real.dtype)
        power = real.to(wide).square() + imaginary.to(wide).square()
        smoothed = (power * self.pool.to(wide).softmax(1).T).sum(-2)
        energy = torch.log(smoothed + config.floor)
        return self.proj((self.gain * (energy - self.offset)).to(self.proj.weight.dtype))


def mel_gabor_filters(config: FilterbankConfig) -> Tensor:
    """The weights that a filterbank starts with, (2 n_filters, kernel): cosines, then sines, under a Gaussian
    each of unit sum.

    Centres are equally far apart in mel, m(f) = 2595 log10(1 + f / 700); the width in frequency is that of
    the distance to the neighbours at half the height, but never narrower than the kernel can hold.
    """
    n, kernel = config.n_filters, config.kernel
    nyquist = config.mel_rate / 2

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    steps = torch.linspace(mel(config.low * nyquist), mel(config.high * nyquist), n + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (steps / 2595) - 1)
    centre = hertz[1:-1] / config.mel_rate  # cycles a sample
    width = (hertz[2:] - hertz[:-2]) / 2 / config.mel_rate  # full width at half height of the modulus
    # A Gaussian of deviation s in time has one of 1 / (2 pi s) in frequency.
    deviation = math.sqrt(2 * math.log(2)) / (math.pi * width)
    deviation = deviation.clamp(max=kernel / 6)
    time = torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2
    envelope = torch.exp(-0.5 * (time / deviation[:, None]).square())
    envelope = 2 * envelope / envelope.sum(1, keepdim=True)  # a full sine has the modulus of its amplitude
    phase = 2 * math.pi * centre[:, None] * time
    return torch.cat([envelope * torch.cos(phase), envelope * torch.sin(phase)]).float()

"""Learned filterbanks: a waveform to the log energies of complex band filters, then to vectors.

Zeghidour et al., "Learning Filterbanks from Raw Speech for Phone Recognition", arXiv 1711.01161, and LEAF,
arXiv 2101.08596: the filters are weights, which start as Gabor filters spaced on the mel scale; their squared
moduli are smoothed over a window, so that the first outputs are close to a log-mel spectrogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import InputConfig, StridedState, StridedWaveformConfig, StridedWaveformInput
from ssm_modal.layers.spec_augment import SpecAugmentConfig, sequence_sums, spec_augment

# A vector of this power in units of its recording's level counts half in the mean: 20 dB below speech.
_QUIET = 0.01
# Below any power of sound, whose 16 bits end at 1e-10.
_NOTHING = 1e-20


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

    normalize: "mean": each recording, packed ones each on its own, is heard relative to its loudness and to
    its spectrum over time (cepstral mean normalisation, Atal, JASA 55, 1974, over what is not silent in it).
    With P_ti the sums above, g_t their geometric mean over the filters, which a hum in few of them does not
    lift, and L = sum_t g_t^2 / sum_t g_t, the level, which silence around the speech does not lower:

        e_ti = log(P_ti / L + floor)      w_t = g_t / (g_t + 0.01 L)      m_i = sum_t w_t e_ti / sum_t w_t

    and e_ti - m_i stands for e_i - offset_i; there is no offset, and floor is relative: 1e-4 leaves 40 dB
    below the level. So the recording's loudness changes nothing, silence before and behind it does not change
    what is heard of the rest, and of a filter in front of it, such as a microphone, no more is left than what
    the floor hides. The waveform itself is left as it is. A model with it needs whole recordings: a causal
    one, or a chunk of a stream, is refused. "none": nothing of this.

    spec_augment: masks on the log energies in training, see `SpecAugmentConfig`.
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
    normalize: Literal["none", "mean"] = "none"
    spec_augment: SpecAugmentConfig | None = None

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

    @property
    def needs_whole(self) -> str | None:
        return None if self.normalize == "none" else "normalize"

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
        self.width = config.n_filters
        hann = torch.hann_window(config.pool_positions + 2, periodic=False)[1:-1]
        self.pool = nn.Parameter(hann.log().expand(config.n_filters, -1).clone())
        # Log energies of speech lie some log units around the middle between the floor and a loud sound.
        self.gain = nn.Parameter(torch.full((config.n_filters,), 0.25))
        self.offset: nn.Parameter | None = None
        if config.normalize == "none":
            self.offset = nn.Parameter(torch.full((config.n_filters,), math.log(config.floor) / 2))
        with torch.no_grad():
            self.conv.weight.copy_(mel_gabor_filters(config))

    def forward(
        self, x: Tensor, state: StridedState | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, Sequences | None, StridedState]:
        config = self.filterbank
        if state is not None and config.normalize != "none":
            raise StateError(
                f"FilterbankInput: was given a state, but normalize is {config.normalize!r}, which needs the "
                "whole recording"
            )
        power, steps, new = super().forward(x, state, seqs=seqs)
        flat = power.flatten(0, 1)
        if self.offset is None:
            energy = normalized_energies(flat, _rows(power, steps), config.floor)
        else:
            energy = torch.log(flat + config.floor) - self.offset
        if self.training and config.spec_augment is not None:
            energy = spec_augment(config.spec_augment, energy, _rows(power, steps))
        energy = energy.view_as(power)
        return self.proj((self.gain * energy).to(self.proj.weight.dtype)), steps, new

    def _embed(self, windows: Tensor) -> Tensor:
        """(..., window) samples to smoothed powers (..., n_filters), fp32, or fp64 with fp64."""
        config = self.filterbank
        heard = windows.to(self.conv.weight.dtype).unfold(-1, config.kernel, config.pool_stride)
        real, imaginary = self.conv(heard).chunk(2, dim=-1)  # (..., positions, n_filters) each
        # Sums of small squares and their logarithm need more digits than half precision has.
        wide = state_dtype(real.dtype)
        power = real.to(wide).square() + imaginary.to(wide).square()
        return (power * self.pool.to(wide).softmax(1).T).sum(-2)


def _rows(power: Tensor, steps: Sequences | None) -> Sequences:
    """`steps`, or the rows of (batch, length, n_filters) laid end to end."""
    if steps is not None:
        return steps
    return Sequences.from_lengths([power.shape[1]] * power.shape[0], power.device)


def normalized_energies(power: Tensor, rows: Sequences, floor: float) -> Tensor:
    """power: (total, n_filters), what filters heard of sequences end to end; the e_ti - m_i of
    `FilterbankConfig.normalize`, (total, n_filters)."""
    index = rows.seq_index()
    frame = torch.log(power + _NOTHING).mean(-1, keepdim=True).exp()
    squares, total = sequence_sums(torch.cat([frame.square(), frame], -1), rows).chunk(2, -1)
    level = (squares / total.clamp(min=_NOTHING)).clamp(min=_NOTHING)[index]
    energy = torch.log(power / level + floor)
    weight = frame / (frame + _QUIET * level)
    sums = sequence_sums(torch.cat([weight * energy, weight], -1), rows)
    return energy - (sums[:, :-1] / sums[:, -1:].clamp(min=_NOTHING))[index]


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

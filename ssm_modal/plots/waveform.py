"""A waveform above its spectrogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


def draw_waveform(panel: Figure | SubFigure, waveform: Tensor, sample_rate: int) -> None:
    """Draw `waveform`, (n,) floating from -1 to 1, over time in s, and under it the power of its short-time
    spectrum in dB (Hann windows of 32 ms, 8 ms apart) over time and frequency in kHz."""
    wave = waveform.detach().float().cpu()
    seconds = wave.shape[0] / sample_rate
    above, below = panel.subplots(2, 1, sharex=True)
    above.plot(torch.arange(wave.shape[0]).numpy() / sample_rate, wave.numpy(), linewidth=0.5)
    above.set_ylim(-1, 1)
    above.set_ylabel("amplitude", fontsize=7)
    window = max(2, round(0.032 * sample_rate))
    spectrum = torch.stft(
        wave,
        n_fft=window,
        hop_length=max(1, window // 4),
        window=torch.hann_window(window),
        pad_mode="constant",
        return_complex=True,
    )
    power = 10 * torch.log10(spectrum.abs().square() + 1e-10)
    below.imshow(
        power.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0.0, seconds, 0.0, sample_rate / 2000),
        cmap="magma",
        vmin=float(power.max()) - 80,
        vmax=float(power.max()),
    )
    below.set_xlabel("s", fontsize=7)
    below.set_ylabel("kHz", fontsize=7)
    below.locator_params(axis="x", nbins=6)
    for axes in (above, below):
        axes.tick_params(labelsize=6)

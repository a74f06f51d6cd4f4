"""Pictures: what stands on the figures, read back from matplotlib, and that they are PNG files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from ssm_modal.plots import Example, confusion_plot, draw_waveform, examples_plot, new_figure


def test_a_confusion_matrix_of_every_size_is_a_png() -> None:
    for n in (1, 10, 40):
        png = confusion_plot(torch.eye(n, dtype=torch.int64), [f"class {i}" for i in range(n)], dpi=40)
        assert png.startswith(b"\x89PNG")


def test_each_example_is_drawn_in_a_panel_with_its_decision() -> None:
    examples = [Example(7, "a", 0.75, "b"), Example(9, "b", 0.5, None), Example(2, "a", 1.0, "a")]
    drawn: list[tuple[int, str, Any]] = []

    def draw(panel: Any, number: int) -> None:
        drawn.append((number, panel.get_suptitle(), panel._suptitle.get_color()))
        panel.subplots()

    assert examples_plot(examples, draw, columns=2, dpi=40).startswith(b"\x89PNG")
    assert drawn == [
        (7, "a (75.0 %), is b", "firebrick"),
        (9, "b (50.0 %)", "black"),
        (2, "a (100.0 %)", "black"),
    ]
    with pytest.raises(ValueError, match="examples is empty"):
        examples_plot([], draw)


def test_the_spectrogram_shows_a_tone_at_its_frequency() -> None:
    rate = 8000
    figure = new_figure(4, 3)
    wave = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(4000) / rate)
    draw_waveform(figure, wave, rate)
    above, below = figure.axes
    line = above.lines[0]
    assert torch.equal(torch.from_numpy(line.get_ydata()), wave)
    assert line.get_xdata()[-1] == pytest.approx(3999 / rate)
    power = below.images[0].get_array()
    bottom, top = below.images[0].get_extent()[2:]
    assert (bottom, top) == (0.0, 4.0)
    assert power[:, power.shape[1] // 2].argmax() * (top / (power.shape[0] - 1)) == pytest.approx(
        1.0, abs=0.02
    )
    draw_waveform(new_figure(2, 2), wave[:3], rate)  # shorter than a window

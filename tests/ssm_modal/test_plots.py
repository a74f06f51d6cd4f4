"""Pictures: what stands on the figures, read back from matplotlib, and that they are PNG files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from ssm_modal.plots import (
    Example,
    confusion_plot,
    draw_image_relevance,
    draw_tokens,
    draw_waveform,
    draw_waveform_relevance,
    examples_plot,
    new_figure,
)


def test_a_confusion_matrix_of_every_size_is_a_png() -> None:
    for n in (1, 10, 40):
        png = confusion_plot(torch.eye(n, dtype=torch.int64), [f"class {i}" for i in range(n)], dpi=40)
        assert png.startswith(b"\x89PNG")


def test_class_names_are_no_formulas_and_leave_room_for_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        "ssm_modal.plots.confusion.new_figure", lambda w, h: made.append(new_figure(w, h)) or made[-1]
    )
    confusion_plot(torch.eye(2, dtype=torch.int64), ["$a_b$", "x" * 50 + "y" * 50], dpi=40)
    axes = made[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["$a_b$", "x" * 12 + "…" + "y" * 11]
    assert not any(text.get_parse_math() for text in [*axes.get_xticklabels(), *axes.get_yticklabels()])
    assert axes.get_window_extent().width > 0.3 * made[0].bbox.width
    confusion_plot(torch.eye(250, dtype=torch.int64), [f"class {i}" for i in range(250)], dpi=40)
    labels = made[1].axes[0].get_xticklabels()
    assert [text.get_text() for text in labels[:3]] == ["class 0", "class 3", "class 6"]
    heights = [text.get_window_extent() for text in made[1].axes[0].get_yticklabels()[:2]]
    assert heights[0].y0 >= heights[1].y1 - 1  # one line does not reach into the next


def test_a_long_decision_takes_two_lines_that_fit_its_panel() -> None:
    widths: list[float] = []

    def draw(panel: Any, number: int) -> None:
        text = panel._suptitle
        widths.append(text.get_window_extent(panel.get_figure(root=True).canvas.get_renderer()).width)
        assert text.get_text().count("\n") == 1
        assert widths[-1] <= panel.bbox.width

    examples_plot([Example(i, "$white $hark" * 9, 0.9, "tiger" * 20) for i in range(2)], draw, dpi=40)
    assert len(widths) == 2
    examples_plot([Example(0, "$a", 0.9, "b$ {")], lambda panel, number: None, dpi=40)  # no formula either


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


def test_a_waveform_takes_the_colour_of_what_its_samples_count() -> None:
    figure = new_figure(4, 3)
    wave = torch.linspace(-0.5, 0.5, 4000)
    relevance = torch.zeros(250)  # a step for 16 samples
    relevance[100:110] = torch.tensor([1.0, -1.0] * 5)
    relevance[200] = 2.0
    draw_waveform_relevance(figure, wave, relevance, 8000)
    above, below = figure.axes
    bars = below.patches
    # 320 bars at most, of 13 samples: a step is more, so a bar is a step.
    assert len(bars) == 250
    assert [bar.get_height() for bar in bars] == relevance.tolist()
    assert bars[200].get_x() == pytest.approx(200 * 16 / 8000)
    colours = above.collections[0].get_colors()
    assert colours[200].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert colours[0].tolist() == pytest.approx([1.0] * 4, abs=0.01)
    assert colours[101].tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0], abs=0.01)  # it spoke against
    lines = above.collections[0].get_segments()
    assert lines[0][0][1] == pytest.approx(-0.5, abs=0.005)
    assert lines[0][1][1] == pytest.approx(float(wave[16]), abs=0.005)


def test_no_bar_of_relevance_is_narrower_than_a_pixel() -> None:
    figure = new_figure(6.4, 3)
    left, _ = figure.subfigures(1, 2)
    relevance = torch.zeros(100_000)
    relevance[70_001] = 5.0
    draw_waveform_relevance(left, torch.zeros(100_000), relevance, 8000)
    figure.canvas.draw()
    bars = left.axes[1].patches
    assert min(bar.get_window_extent().width for bar in bars) >= 0.85
    assert max(bar.get_height() for bar in bars) == 5.0


def test_tokens_stand_on_their_colours_in_lines() -> None:
    figure = new_figure(8, 3)
    relevance = torch.zeros(100)
    relevance[97] = 3.0
    draw_tokens(figure, ["$"] * 100, relevance, start=7)
    axes = figure.axes[0]
    boxes = axes.patches
    assert len(boxes) == 100
    assert (boxes[97].get_x(), boxes[97].get_y()) == (17, 0.5)  # the second line, 18th character
    assert boxes[97].get_facecolor()[0] > boxes[97].get_facecolor()[1]
    numbers = [text.get_text() for text in axes.texts if text.get_text() != "$"]
    assert numbers == ["7", "87"]
    with pytest.raises(ValueError, match="tokens has 1 entries, expected 100"):
        draw_tokens(figure, ["a"], relevance)
    many = new_figure(8, 3)
    draw_tokens(many, ["a"] * 2500, torch.ones(2500), start=100)
    assert many.axes[0].get_xlabel() == "token"
    assert sum(bar.get_height() for bar in many.axes[0].patches) == pytest.approx(2500)
    assert many.axes[0].patches[0].get_x() == pytest.approx(99.5)


def test_patches_lie_over_the_whole_image() -> None:
    figure = new_figure(6, 3)
    image = torch.rand(8, 12, 3)
    relevance = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    draw_image_relevance(figure, image, relevance)
    left, right = figure.axes[:2]
    assert torch.equal(torch.from_numpy(left.images[0].get_array()), image)
    over = right.images[1]
    assert tuple(over.get_extent()) == (-0.5, 11.5, 7.5, -0.5)
    assert over.get_array().tolist() == relevance.tolist()
    assert (over.norm.vmin, over.norm.vmax) == (0.0, 5.0)
    draw_image_relevance(new_figure(6, 3), torch.rand(4, 4, 1), -torch.ones(4, 4))

"""Pictures of classifications and of what was classified; drawing needs matplotlib (extra "train")."""

from ssm_modal.plots.confusion import confusion_plot
from ssm_modal.plots.examples import Example, examples_plot
from ssm_modal.plots.figure import new_figure, png
from ssm_modal.plots.image import draw_image
from ssm_modal.plots.mutations import mutation_plot
from ssm_modal.plots.relevance import (
    draw_image_relevance,
    draw_tokens,
    draw_track,
    draw_waveform_relevance,
    token_lines,
)
from ssm_modal.plots.tracks import track_plot
from ssm_modal.plots.waveform import draw_waveform

__all__ = [
    "Example",
    "confusion_plot",
    "draw_image",
    "draw_image_relevance",
    "draw_tokens",
    "draw_track",
    "draw_waveform",
    "draw_waveform_relevance",
    "examples_plot",
    "mutation_plot",
    "new_figure",
    "png",
    "token_lines",
    "track_plot",
]

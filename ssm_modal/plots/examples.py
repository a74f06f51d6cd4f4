"""A grid of classified examples, each drawn by whoever knows what it looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssm_modal.plots.figure import new_figure, png, shortened

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_LETTERS = 32  # of a line over a panel


@dataclass(frozen=True)
class Example:
    """A classified sequence. number: its place in what was gone through. predicted: the class, taken with
    `probability`. label: the true class, None where it is not known."""

    number: int
    predicted: str
    probability: float
    label: str | None

    @property
    def title(self) -> str:
        """The decision in words, in two lines where one would be too long for a panel."""
        said = f"{shortened(self.predicted, _LETTERS)} ({100 * self.probability:.1f} %)"
        if self.label is None or self.label == self.predicted:
            return said
        is_so = f"is {shortened(self.label, _LETTERS)}"
        return f"{said}, {is_so}" if len(said) + len(is_so) <= _LETTERS else f"{said},\n{is_so}"


def examples_plot(
    examples: Sequence[Example], draw: Callable[[SubFigure, int], None], *, columns: int = 4, dpi: int = 100
) -> bytes:
    """A PNG with a panel an example, titled by the decision, in red where it is wrong.

    examples: one or more. draw: draws the example of that number into the panel, which has one title already.
    """
    if not examples:
        raise ValueError("examples is empty, expected one or more")
    columns = min(columns, len(examples))
    rows = math.ceil(len(examples) / columns)
    figure = new_figure(3.2 * columns, 2.6 * rows)
    panels = figure.subfigures(rows, columns, squeeze=False).flatten()
    for panel, example in zip(panels, examples):
        wrong = example.label is not None and example.label != example.predicted
        color = "firebrick" if wrong else "black"
        panel.suptitle(example.title, fontsize=9, color=color, parse_math=False)
        draw(panel, example.number)
    return png(figure, dpi)

"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssm_modal.plots.figure import new_figure, png, shortened

_LABELS = 120  # so many names of classes are legible along a side at most
_LETTERS = 24  # of a name


def confusion_plot(matrix: Tensor, names: Sequence[str], *, dpi: int = 150) -> bytes:
    """A PNG of the confusion matrix: shares of each true class as shades, sequences as numbers up to 30
    classes. Of very many classes every so-manieth is named. matrix: (n, n) int64, a row a true class."""
    n = len(names)
    every = -(-n // _LABELS)
    shown = [shortened(name, _LETTERS) for name in names[::every]]
    size = min(10.0, 800 / len(shown))
    room = 0.008 * size * max(map(len, shown))  # inches that the names take beside the matrix
    side = min(16.0, max(3.6, 0.45 * n + 1.6) + room)
    figure = new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    share = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class (%)")
    turned = 90 if max(map(len, shown)) > 3 else 0
    axes.set_xticks(range(0, n, every), shown, rotation=turned, fontsize=size, parse_math=False)
    axes.set_yticks(range(0, n, every), shown, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    total, right = int(matrix.sum()), int(matrix.diagonal().sum())
    axes.set_title(f"{right} of {total} right ({100 * right / max(1, total):.1f} %)", fontsize=10)
    if n <= 30:
        for i, row in enumerate(matrix.tolist()):
            for j, cell in enumerate(row):
                if cell:
                    color = "white" if share[i, j] > 50 else "black"
                    axes.text(j, i, str(cell), ha="center", va="center", color=color, fontsize=8)
    return png(figure, dpi)

"""An image as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


def draw_image(panel: Figure | SubFigure, image: Tensor) -> None:
    """Draw `image`, (height, width, channels) floating from 0 to 1, grey or RGB, into `panel`."""
    axes = panel.add_subplot()
    pixels = image.detach().float().cpu()
    if pixels.shape[-1] == 1:
        axes.imshow(pixels[..., 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(pixels.numpy(), interpolation="nearest")
    axes.set_axis_off()

"""How image files become the input of a trained model, for the commands that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.checkpoints.locate import stored_data
from ssm_modal.io.image_transforms import ImagePreprocessing, as_pixels, pixel_order
from ssm_modal.io.images import read_image
from ssm_modal.models import VisionMambaConfig


class ImageInput:
    """What a run's checkpoint says about its images: how one becomes the model's input."""

    def __init__(self, preprocessing: ImagePreprocessing, layout: str, permutation_seed: int | None) -> None:
        self.preprocessing, self.layout = preprocessing, layout
        self.transform = preprocessing.evaluation()
        height, width = preprocessing.size
        self.order = pixel_order(height * width, permutation_seed)

    def grid(self, values: Tensor) -> Tensor:
        """Numbers of the pixels in the order they are read, (batch, pixels), as (batch, height, width)."""
        if self.order is not None:
            values = values[:, self.order.argsort().to(values.device)]
        return values.unflatten(1, self.preprocessing.size)

    def read(self, file: Path) -> Tensor:
        return self.transform(read_image(file, self.preprocessing.channels))

    def batch(self, images: list[Tensor]) -> Tensor:
        stacked = torch.stack(images)
        return stacked if self.layout == "images" else as_pixels(stacked, self.order)


def image_input(
    model: Any, place: Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> ImageInput:
    """As the run's checkpoint at `place` says, else by the model's config, `mean` and `std`.

    Raises ValueError where neither says it, or both do.
    """
    stored = stored_data(place)
    given = [name for name, value in (("mean", mean), ("std", std)) if value is not None]
    if "image_size" in stored:
        if given:
            raise ValueError(f"--{given[0]} is given, but the run at {place} knows its own")
        return ImageInput(
            ImagePreprocessing(
                tuple(stored["image_size"]),  # type: ignore[arg-type]
                stored["channels"],
                tuple(stored["mean"]),
                tuple(stored["std"]),
                stored["crop_pct"],
                stored["interpolation"],
            ),
            stored["layout"],
            stored["permutation_seed"],
        )
    if not isinstance(model.config, VisionMambaConfig):
        raise ValueError(
            f"--model is a {type(model).__name__} without a run of images, expected one, or a Vision Mamba"
        )
    if mean is None or std is None:
        raise ValueError(f"{place} does not say how its images were normalised; give --mean and --std")
    config = model.config
    return ImageInput(
        ImagePreprocessing(config.image, config.in_chans, tuple(mean), tuple(std)), "images", None
    )

"""Images to tensors, by timm's transforms: resized and normalised the same way each time, or augmented."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]


@dataclass(frozen=True)
class ImageAugmentation:
    """Random changes in training; the first names are those of `timm.data.create_transform`.

    scale, ratio: area and aspect ratio of a random crop, as a share of the image. hflip, vflip: chances of a
    flip. color_jitter: strength, None for none. auto_augment: timm's policy, such as "rand-m9-mstd0.5-inc1",
    None for none; for colour. re_prob, re_mode, re_count: random erasing. degrees, translate, zoom, shear: of
    one random affine map before all that: rotation by up to `degrees`, shifts by up to this share of the
    sides, a factor from 1 - zoom to 1 + zoom, a shear of up to this many degrees.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: float | None = None
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1
    degrees: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"augment.{name} is {pair}, expected two numbers above 0, the smaller first")
        if self.scale[1] > 1:
            raise ValueError(f"augment.scale is {self.scale}, expected at most 1, the whole image")
        for name in ("hflip", "vflip", "re_prob", "translate", "zoom"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "zoom" and value == 1):
                raise ValueError(f"augment.{name} is {value}, expected from 0 to 1")
        for name in ("degrees", "shear"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} is {getattr(self, name)}, expected 0 or more")


@dataclass(frozen=True)
class ImagePreprocessing:
    """How an image becomes a tensor (channels, height, width) float32.

    size: (height, width). channels: 1 or 3. mean, std: of each channel, for pixels from 0 to 1. crop_pct: in
    evaluation the image is resized so that a centre crop of `size` is this share of it. interpolation: as
    timm names it.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"image_size is {self.size}, expected one number of pixels, or height and width")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels!r}, expected 1 (grey) or 3 (RGB)")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise ValueError(
                    f"{name} holds {len(values)} numbers, expected {self.channels}, one a channel"
                )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}, expected numbers above 0")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}, expected above 0 and at most 1")
        if self.interpolation not in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
            raise ValueError(
                f"interpolation is {self.interpolation!r}, expected nearest, bilinear, bicubic, lanczos, "
                "box or hamming"
            )

    def evaluation(self) -> Transform:
        """The same tensor for an image each time."""
        return _create_transform(
            input_size=(self.channels, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )

    def training(self, augment: ImageAugmentation) -> Transform:
        """Draws from Python's, numpy's and torch's global generators, as timm does."""
        if augment.auto_augment is not None and self.channels != 3:
            raise ValueError(
                f"augment.auto_augment is {augment.auto_augment!r} with {self.channels} channel, expected "
                "None: its policies are for colour"
            )
        after = _create_transform(
            input_size=(self.channels, *self.size),
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
            re_count=augment.re_count,
        )
        if not (augment.degrees or augment.translate or augment.zoom or augment.shear):
            return after
        from torchvision.transforms import Compose, InterpolationMode, RandomAffine

        affine = RandomAffine(
            augment.degrees,
            translate=(augment.translate, augment.translate),
            scale=(1 - augment.zoom, 1 + augment.zoom),
            shear=augment.shear,
            interpolation=InterpolationMode.BILINEAR,
        )
        return Compose([affine, after])

    def undo(self, image: Tensor) -> Tensor:
        """(channels, height, width), normalised, to (height, width, channels) from 0 to 1, to look at."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (image.float().cpu() * std[:, None, None] + mean[:, None, None]).clamp(0, 1).permute(1, 2, 0)


def pixel_order(pixels: int, seed: int | None) -> Tensor | None:
    """The order in which an image's pixels are read, (pixels,) int64: a permutation fixed by `seed`; None:
    as they stand, by rows."""
    if seed is None:
        return None
    return torch.randperm(pixels, generator=torch.Generator().manual_seed(seed))


def as_pixels(images: Tensor, order: Tensor | None) -> Tensor:
    """Images (batch, channels, height, width) as sequences of pixels (batch, height * width, channels)."""
    pixels = images.flatten(2).transpose(1, 2)
    return pixels.contiguous() if order is None else pixels[:, order]


def _create_transform(input_size: Sequence[int], **options: Any) -> Any:
    try:
        from timm.data import create_transform
    except ImportError as error:
        raise ImportError('images need timm: pip install "ssm-modal[vision]"') from error
    return create_transform(input_size=tuple(input_size), **options)  # type: ignore[arg-type]

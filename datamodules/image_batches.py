"""What a batch of images holds, as a pure function of its number."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssm_modal.datamodules.image_sources import Sample
from ssm_modal.datamodules.resumable import derived_generator, derived_seed, global_rows
from ssm_modal.io.image_transforms import (
    ImageAugmentation,
    ImagePreprocessing,
    Transform,
    as_pixels,
    pixel_order,
)

Layout = Literal["images", "pixels"]
_UNKNOWN = -100


@dataclass
class ImageBatches:
    """Batches of one split, each a pure function of its index: `make(index, rank, world)`.

        images (batch, channels, height, width) float32, with layout "images"; or
        pixels (batch, height * width, channels) float32, with layout "pixels"
        labels (batch,) int64: the class, -100 where it is not known
        recordings (batch,) int64: the place of each in `samples`

    In training every epoch goes through all samples once, in an order of its own, and a batch may reach over
    into the next. classes: their names, in the order of their numbers.
    """

    samples: Sequence[Sample]
    classes: Sequence[str]
    preprocessing: ImagePreprocessing
    batch_size: int
    layout: Layout = "images"
    permutation_seed: int | None = None
    augment: ImageAugmentation | None = None
    seed: int = 0
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _transforms: tuple[Transform, Transform] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        height, width = self.preprocessing.size
        self._pixels = pixel_order(height * width, self.permutation_seed)
        self._numbers = {name: i for i, name in enumerate(self.classes)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}, "_transforms": None}

    @property
    def n_batches(self) -> int:
        """Batches that evaluation takes."""
        return -(-len(self.samples) // self.batch_size)

    def make_training(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Training batch `index` of process `rank`."""
        rows = global_rows(index, self.batch_size, rank, world)
        places = [self._order(row // len(self.samples))[row % len(self.samples)] for row in rows]
        if self.augment is None:
            return self._batch(places, self._transform(False))
        with _seeded(derived_seed(self.seed, "images", "augment", index, rank)):
            return self._batch(places, self._transform(True))

    def make_evaluation(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Evaluation batch `index`: over all batches every sample once, in order, never augmented."""
        first = index * self.batch_size
        places = range(first, min(first + self.batch_size, len(self.samples)))
        return self._batch(places, self._transform(False))

    def _transform(self, training: bool) -> Transform:
        if self._transforms is None:
            plain = self.preprocessing.evaluation()
            drawn = plain if self.augment is None else self.preprocessing.training(self.augment)
            self._transforms = (plain, drawn)
        return self._transforms[training]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = derived_generator(self.seed, "images", "epoch", epoch)
            order = torch.randperm(len(self.samples), generator=generator).tolist()
            before = self._orders.get(
                epoch - 1
            )  # a batch reaches over at most one border, or few tiny epochs
            self._orders = {epoch: order} if before is None else {epoch - 1: before, epoch: order}
        return self._orders[epoch]

    def _batch(self, places: Sequence[int], transform: Transform) -> dict[str, Tensor]:
        chosen = [self.samples[place] for place in places]
        images = torch.stack([transform(one.read(self.preprocessing.channels)) for one in chosen])
        found = {"images": images} if self.layout == "images" else {"pixels": as_pixels(images, self._pixels)}
        labels = [_UNKNOWN if one.label is None else self._numbers[one.label] for one in chosen]
        return {
            **found,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "recordings": torch.tensor(list(places), dtype=torch.int64),
        }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators that timm's transforms draw from start at `seed`; afterwards they are as
    they were."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])

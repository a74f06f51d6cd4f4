"""Where images come from: folders of files and published sets, as the samples of each split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ssm_modal.io.image_arrays import ImageArray, read_cifar, read_mnist
from ssm_modal.io.images import ImageError, ImageFile, find_images, read_image
from ssm_modal.io.recordings import SPLITS, LeftOut, Recording, assign_splits
from ssm_modal.io.text import expand_path

if TYPE_CHECKING:
    from PIL.Image import Image

PUBLISHED = ("mnist", "cifar10", "cifar100")


@dataclass(frozen=True)
class Sample:
    """An image: a file, or image `number` of an array. label: the name of its class, None where not known."""

    label: str | None
    source: Path | ImageArray
    number: int = 0

    @property
    def name(self) -> str:
        """The file, or the file of the array and the place in it."""
        return str(self.source) if isinstance(self.source, Path) else f"{self.source.source}[{self.number}]"

    def read(self, channels: int) -> Image:
        """The image, grey or RGB, as `read_image` does."""
        if isinstance(self.source, Path):
            return read_image(self.source, channels)
        from PIL import Image

        image = Image.fromarray(self.source.images[self.number].contiguous().numpy())
        return image.convert("L" if channels == 1 else "RGB")


@dataclass
class Samples:
    """The samples of each split, the names of their classes in the order of their numbers, and what was left
    out on the way."""

    samples: dict[str, list[Sample]]
    classes: tuple[str, ...]
    left_out: list[LeftOut] = field(default_factory=list)


def published_images(path: str, name: str, val_images: int) -> Samples:
    """A set of `PUBLISHED` from the folder `path`; the last `val_images` training images validate."""

    def read(split: str) -> list[Sample]:
        array = read_mnist(path, split) if name == "mnist" else read_cifar(path, name, split)
        classes.update(dict.fromkeys(array.classes))
        return [Sample(array.classes[int(n)], array, i) for i, n in enumerate(array.labels)]

    classes: dict[str, None] = {}
    both, test = read("train"), read("test")
    border = len(both) - val_images
    if border < 1:
        raise ValueError(f"val_images is {val_images}, expected fewer than the {len(both)} training images")
    return Samples({"train": both[:border], "validation": both[border:], "test": test}, tuple(classes))


def folder_images(
    path: str,
    source: str,
    *,
    val_fraction: float,
    test_fraction: float,
    suffixes: Sequence[str],
    channels: int | None,
    skip_bad: bool,
    any_label: bool,
) -> Samples:
    """The images below `path`. source: "folder", "imagenet" or "unlabelled", see `ImageDataModule`.

    channels: what each file is decoded to, to see whether that works; None: unseen. any_label: labels that
    training has not are welcome, as where a folder is classified; otherwise they are bad.
    """
    root = expand_path(path)
    if source == "imagenet":
        for name in ("train", "val"):
            if not (root / name).is_dir():
                raise FileNotFoundError(
                    f'path is {str(root)!r} with source "imagenet": no folder {name} in it'
                )
    labels: Literal["folder", "none"] = "none" if source == "unlabelled" else "folder"
    found = find_images(path, labels, suffixes=suffixes, skip_bad=skip_bad)
    left_out = list(found.left_out)
    files = found.files if channels is None else _readable(found.files, channels, left_out, skip_bad)
    known = "test" if labels == "none" else None  # what has no label is predicted, in its order
    recordings = assign_splits(
        [Recording(one.path, one.label, one.split or known) for one in files], val_fraction, test_fraction
    )
    if not any_label:
        recordings = _learnable(recordings, left_out, skip_bad)
    folders = sorted({one.label for one in recordings if one.label is not None})
    shown = _names(folders, root if source == "imagenet" else None)
    samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for one in recordings:
        samples[str(one.split)].append(Sample(None if one.label is None else shown[one.label], one.path))
    return Samples(samples, tuple(shown[label] for label in folders), left_out)


def _readable(
    files: Sequence[ImageFile], channels: int, left_out: list[LeftOut], skip_bad: bool
) -> list[ImageFile]:
    """Those of `files` that can be decoded; the first other one raises, or they go to `left_out`."""
    kept = []
    for one in files:
        try:
            read_image(one.path, channels)
        except ImageError as error:
            if not skip_bad:
                raise
            left_out.append(LeftOut(error.path, error.problem))
        else:
            kept.append(one)
    return kept


def _learnable(recordings: Sequence[Recording], left_out: list[LeftOut], skip_bad: bool) -> list[Recording]:
    """Those whose label training has too; others raise, or go to `left_out`."""
    train = {one.label for one in recordings if one.split == "train"}
    kept = []
    for one in recordings:
        if not train or one.label in train:
            kept.append(one)
            continue
        problem = f"no training image has the label {one.label!r}, expected one"
        if not skip_bad:
            raise ImageError(one.path.parent, problem)
        left_out.append(LeftOut(one.path, problem))
    return kept


def _names(folders: Sequence[str], imagenet: Path | None) -> dict[str, str]:
    """How each class is called: by its folder, or by the first name that torchvision's `meta.bin` in the
    folder `imagenet` has for it."""
    file = None if imagenet is None else imagenet / "meta.bin"
    if file is None or not file.is_file():
        return {folder: folder for folder in folders}
    words, _ = torch.load(file, weights_only=True)
    first = {key: one[0] if isinstance(one, (tuple, list)) else str(one) for key, one in words.items()}
    shown = {folder: first.get(folder, folder) for folder in folders}
    if len(set(shown.values())) < len(shown):  # two folders of one name, as ImageNet's cranes are
        shown = {folder: f"{name} ({folder})" if name != folder else folder for folder, name in shown.items()}
    return shown

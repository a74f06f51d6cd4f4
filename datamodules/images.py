"""Images for classification, from a folder or a published set on the local disk; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssm_modal.datamodules.image_batches import ImageBatches, Layout
from ssm_modal.datamodules.image_sources import PUBLISHED, Sample, folder_images, published_images
from ssm_modal.datamodules.left_out import warn_left_out
from ssm_modal.datamodules.resumable import ResumableLoader, check_same, run_seed
from ssm_modal.datamodules.run_files import write_run_files
from ssm_modal.io.image_transforms import ImageAugmentation, ImagePreprocessing, as_pixels, pixel_order
from ssm_modal.io.images import IMAGE_SUFFIXES
from ssm_modal.io.recordings import SPLITS, LeftOut
from ssm_modal.plots import draw_image, draw_image_relevance

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

Source = Literal["folder", "unlabelled", "imagenet", "mnist", "cifar10", "cifar100"]
_SOURCES = ("folder", "unlabelled", "imagenet", "mnist", "cifar10", "cifar100")
# Where the published sets stand below SSM_MODAL_DATA.
_PRESETS = {"mnist": "vision/mnist", "cifar10": "vision/cifar10", "cifar100": "vision/cifar100"}
# Means and deviations of the training images: computed on MNIST, as published for the others.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "colour": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    "grey": ((0.5,), (0.5,)),
}


class ImageDataModule(pl.LightningDataModule):
    """Batches of images, whole or as sequences of their pixels. See `ImageBatches` for what a batch holds.

    Every batch is a pure function of (seed, split, index, process).

    Args:
        path: the folder of the images. `~` and environment variables (`$NAME`, `${NAME}`) are filled in.
            None: where a published set stands below `$SSM_MODAL_DATA` (`vision/mnist`, `vision/cifar10`,
            `vision/cifar100`).
        source: "folder" (label: the folder a file stands in, see `find_images`), "unlabelled" (any files, to
            be classified), "imagenet" (`train/` and `val/` with a folder a class; torchvision's `meta.bin`
            gives the names of the classes where it is there), or the original files of "mnist", "cifar10" or
            "cifar100" in torchvision's folders, MNIST's also gzipped.
        image_size: pixels of what the model sees, one number for a square or [height, width].
        channels: 1 (grey) or 3 (RGB); images of another kind are converted, see `read_image`.
        layout: "images" (channels, height, width), or "pixels", a sequence of single pixels by rows.
        permutation_seed: of layout "pixels": read them in an order fixed by this seed; None: by rows.
        augment: see `ImageAugmentation`; training alone. None: as in evaluation.
        crop_pct, interpolation: see `ImagePreprocessing`.
        mean, std: what each channel is normalised by; None: the set's, else ImageNet's (grey: 0.5 and 0.5).
        batch_size: images a training batch of each process holds.
        eval_batch_size: the same for validation, test and prediction; None: `batch_size`.
        val_fraction, test_fraction: parts of the images of each class, in the order of a hash of their names,
            where the folder is not split already.
        val_images: of the published sets: the last so many training images are for validation.
        suffixes: endings of the files read below a folder.
        check_images: decode every file once before the run starts, so that a bad one is found then.
        skip_bad: leave bad files and folders out instead of raising, warn, and list them with the reason in
            `left_out` and, at the start of `fit`, in `left_out.csv` in the run's folder; needs check_images.
        predict: what `ssm-modal predict` goes through: the "test" split, or "all" images in the order of
            their names, for a folder to be classified; its source may then be "unlabelled", and it need not
            have every class.
        num_workers: processes that prepare batches; the batches are the same with any number.
        pin_memory: copy batches to pinned memory, for training on a GPU.
        seed: order and augmentation; None: the run's seed (`--seed_everything`).

    Raises FileNotFoundError and ImageError, naming the file or folder, and ValueError for any other bad
    argument.
    """

    def __init__(
        self,
        path: str | None = None,
        source: Source = "folder",
        image_size: int | list[int] = 224,
        channels: int = 3,
        layout: Layout = "images",
        permutation_seed: int | None = None,
        augment: ImageAugmentation | None = None,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        val_images: int = 5000,
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
        check_images: bool = True,
        skip_bad: bool = False,
        predict: Literal["test", "all"] = "test",
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("source", source, _SOURCES),
            ("layout", layout, ("images", "pixels")),
            ("predict", predict, ("test", "all")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        for name, number in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size or batch_size)):
            if number < 1:
                raise ValueError(f"{name} is {number}, expected 1 or more")
        for name, number in (("num_workers", num_workers), ("val_images", val_images)):
            if number < 0:
                raise ValueError(f"{name} is {number}, expected 0 or more")
        if permutation_seed is not None and layout != "pixels":
            raise ValueError(
                f'permutation_seed is {permutation_seed} with layout {layout!r}, expected layout "pixels"'
            )
        if source == "unlabelled" and predict != "all":
            raise ValueError(
                f'source is "unlabelled" with predict {predict!r}, expected one with labels, or "all"'
            )
        if tuple(suffixes) != IMAGE_SUFFIXES and source in PUBLISHED:
            raise ValueError(f"suffixes is given with source {source!r}, expected it for a folder alone")
        if skip_bad and not check_images:
            raise ValueError(
                "skip_bad is true with check_images false, expected both: bad files are found so"
            )
        if path is None:
            if source not in _PRESETS:
                raise ValueError(f"path is None with source {source!r}, expected the folder of the images")
            if "SSM_MODAL_DATA" not in os.environ:
                raise ValueError(
                    "path is None and SSM_MODAL_DATA is not set; give path, or set it to the folder that "
                    f"holds {_PRESETS[source]}"
                )
            path = os.path.join(os.environ["SSM_MODAL_DATA"], _PRESETS[source])
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        known = _STATISTICS.get(source)
        if known is None or len(known[0]) != channels:
            known = _STATISTICS["grey" if channels == 1 else "colour"]
        self.preprocessing = ImagePreprocessing(
            size,  # type: ignore[arg-type]
            channels,
            known[0] if mean is None else tuple(mean),
            known[1] if std is None else tuple(std),
            crop_pct,
            interpolation,
        )
        self.path, self.source = path, source
        self.layout, self.permutation_seed, self.augment = layout, permutation_seed, augment
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.val_fraction, self.test_fraction, self.val_images = val_fraction, test_fraction, val_images
        self.suffixes, self.check_images, self.skip_bad = tuple(suffixes), check_images, skip_bad
        self.predict = predict
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._samples: dict[str, list[Sample]] | None = None
        self._classes: tuple[str, ...] = ()
        self._left_out: list[LeftOut] = []

    @property
    def input(self) -> Layout:
        """What a batch has for the model: "images" or "pixels"."""
        return self.layout

    @property
    def channels(self) -> int:
        return self.preprocessing.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what the model sees."""
        return self.preprocessing.size

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of all images, sorted (a published set's in its order): a class's number is its
        place."""
        self._prepare()
        return self._classes

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """With `skip_bad`, what was left out and why."""
        self._prepare()
        return tuple(self._left_out)

    def samples(self, split: str) -> list[Sample]:
        """The images of `split` ("train", "validation" or "test"), in order."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        return self._prepare()[split]

    def predicted_files(self) -> list[str]:
        """The names of what is predicted, in order: what the numbers in a batch's `recordings` stand for."""
        return [sample.name for sample in self._predicted()]

    def draw_example(self, panel: SubFigure, split: str, number: int) -> None:
        """Draw image `number` of "validation", "test" or "predict" into the matplotlib subfigure `panel`, as
        the model sees it."""
        draw_image(panel, self.preprocessing.undo(self._example(split, number)))

    def example_input(self, split: str, number: int) -> Tensor:
        """What the model reads of that image: (1, channels, height, width), or (1, pixels, channels) in the
        order of layout "pixels"."""
        image = self._example(split, number).unsqueeze(0)
        return image if self.layout == "images" else as_pixels(image, self._pixel_order())

    def draw_relevance(self, panel: SubFigure, split: str, number: int, relevance: Tensor) -> None:
        """As `draw_example`, with the `relevance` of its pixels, (height, width), or (pixels,) in their
        order, over it."""
        if relevance.ndim == 1:
            order = self._pixel_order()
            placed = relevance if order is None else relevance[order.argsort()]
            relevance = placed.unflatten(0, self.image_size)
        draw_image_relevance(panel, self.preprocessing.undo(self._example(split, number)), relevance)

    def _pixel_order(self) -> Tensor | None:
        height, width = self.image_size
        return pixel_order(height * width, self.permutation_seed)

    def _example(self, split: str, number: int) -> Tensor:
        samples = self._predicted() if split == "predict" else self.samples(split)
        return self.preprocessing.evaluation()(samples[number].read(self.channels))

    def _predicted(self) -> list[Sample]:
        splits = self._prepare()
        if self.predict == "test":
            return splits["test"]
        every = [sample for name in SPLITS for sample in splits[name]]
        return every if self.source in PUBLISHED else sorted(every, key=lambda sample: sample.name)

    def setup(self, stage: str | None = None) -> None:
        """Find and check the images; at the start of `fit`, write down what was left out."""
        samples = self._prepare()
        trainer = self.trainer
        if stage in ("fit", "test") and not samples["test"]:
            rank_zero_warn(
                f"the test split of {self.path!r} holds no image, so nothing is tested: give it one or more, "
                "or a larger test_fraction"
            )
        if stage != "fit" or trainer is None:
            return
        write_run_files(trainer, left_out=self._left_out if self.skip_bad else None)

    def check_fit(self) -> None:
        """Raise ValueError where training lacks images, or a class."""
        self.batches("train")

    def batches(self, split: str) -> ImageBatches:
        """The batches of `split` as pure functions of their index; ValueError where it has no image."""
        return self._batches(self.samples(split), split)

    def _batches(self, samples: list[Sample], split: str) -> ImageBatches:
        if not samples:
            raise ValueError(
                f"the {split} split of {self.path!r} holds no image, expected one or more"
                + (f" ({len(self._left_out)} were left out as bad)" if self._left_out else "")
            )
        train = split == "train"
        lacking = set(self._classes) - {s.label for s in samples}
        if train and not self._classes:
            raise ValueError(f"no image of {self.path!r} has a label, expected labels to train by")
        if train and lacking:
            raise ValueError(
                f"the train split of {self.path!r} holds no image of {', '.join(sorted(lacking))}, "
                "expected one or more of each class"
            )
        return ImageBatches(
            samples,
            self._classes,
            self.preprocessing,
            self.batch_size if train else self.eval_batch_size,
            self.layout,
            self.permutation_seed,
            self.augment,
            run_seed(self.seed),
        )

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader.training(
            self.batches("train").make_training,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        # Without a validation split there is nothing to validate on; Lightning skips an empty list.
        return self._loader(self.batches("validation")) if self.samples("validation") else []

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        # A few images need not lose a training over a test: `setup` has said that there is none.
        return self._loader(self.batches("test")) if self.samples("test") else []

    def predict_dataloader(self) -> ResumableLoader:
        return self._loader(self._batches(self._predicted(), "test"))

    def _loader(self, batches: ImageBatches) -> ResumableLoader:
        return ResumableLoader.evaluation(
            batches.make_evaluation,
            batches.n_batches,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's user must know: the classes, and how an image becomes the model's input."""
        about = self.preprocessing
        return {
            "classes": list(self.classes),
            "image_size": list(about.size),
            "channels": about.channels,
            "mean": list(about.mean),
            "std": list(about.std),
            "crop_pct": about.crop_pct,
            "interpolation": about.interpolation,
            "layout": self.layout,
            "permutation_seed": self.permutation_seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint was trained on other classes or another input.

        Outside training these images need not have every class: their numbers are the checkpoint's.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if not fitting and set(self.classes) <= set(state_dict["classes"]):
            self._classes = tuple(state_dict["classes"])
        check_same(state_dict, self.state_dict(), self.trainer)

    def _prepare(self) -> dict[str, list[Sample]]:
        if self._samples is not None:
            return self._samples
        if self.source in PUBLISHED:
            found = published_images(self.path, self.source, self.val_images)
        else:
            found = folder_images(
                self.path,
                self.source,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                suffixes=self.suffixes,
                channels=self.channels if self.check_images else None,
                skip_bad=self.skip_bad,
                any_label=self.predict == "all",
            )
        self._classes, self._left_out = found.classes, found.left_out
        warn_left_out(self._left_out, "files or folders")
        self._samples = found.samples
        return self._samples

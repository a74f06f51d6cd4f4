"""ImageDataModule: what batches hold, splits, exact order and augmentation, and bad input."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

import numpy as np
from PIL import Image

from ssm_modal.datamodules.images import ImageDataModule
from ssm_modal.io.image_transforms import ImageAugmentation, pixel_order
from ssm_modal.io.images import ImageError
from tests.datamodules.made_images import write_cifar, write_folder, write_mnist

AUGMENT = ImageAugmentation(degrees=20, translate=0.1, zoom=0.2, shear=5, hflip=0.5, re_prob=0.5)


def mnist(folder: Path, **options: Any) -> ImageDataModule:
    settings: dict[str, Any] = {
        "source": "mnist",
        "image_size": 28,
        "channels": 1,
        "batch_size": 4,
        "seed": 1,
    }
    return ImageDataModule(str(folder), **{**settings, "val_images": 5, **options})


def folder(root: Path, **options: Any) -> ImageDataModule:
    settings: dict[str, Any] = {
        "image_size": 16,
        "batch_size": 4,
        "val_fraction": 0.25,
        "test_fraction": 0.25,
    }
    return ImageDataModule(str(root), **{**settings, "seed": 1, **options})


def test_mnist_is_split_and_normalised(tmp_path: Path) -> None:
    made = write_mnist(tmp_path, train=20, test=6)
    data = mnist(tmp_path)
    assert data.classes == tuple("0123456789")
    with pytest.raises(
        ValueError, match=r"holds no image of 5, 6, 7, 8, 9, expected one or more of each class"
    ):
        mnist(tmp_path, val_images=15).batches("train")
    batch = data.batches("validation").make_evaluation(1, 0, 1)
    assert batch["images"].dtype == torch.float32
    expected = (made["train"][19:20, None].float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(batch["images"], expected)
    assert batch["labels"].tolist() == [9]
    assert batch["recordings"].tolist() == [4]
    tests = [data.batches("test").make_evaluation(i, 0, 1) for i in range(data.batches("test").n_batches)]
    assert torch.cat([b["labels"] for b in tests]).tolist() == [0, 1, 2, 3, 4, 5]
    assert data.predicted_files()[2] == "t10k-images-idx3-ubyte.gz[2]"
    with pytest.raises(ValueError, match="val_images is 20, expected fewer than the 20 training images"):
        mnist(tmp_path, val_images=20).classes  # noqa: B018


def test_pixels_are_the_image_in_a_fixed_order(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = mnist(tmp_path).batches("test").make_evaluation(0, 0, 1)["images"]
    plain = mnist(tmp_path, layout="pixels").batches("test").make_evaluation(0, 0, 1)["pixels"]
    assert torch.equal(plain, images.flatten(2).transpose(1, 2))
    permuted = mnist(tmp_path, layout="pixels", permutation_seed=5).batches("test")
    order = pixel_order(784, 5)
    assert order is not None
    assert torch.equal(permuted.make_evaluation(0, 0, 1)["pixels"], plain[:, order])
    # In training the order is the same, and images are augmented before it.
    same = mnist(tmp_path, layout="pixels", permutation_seed=5, augment=ImageAugmentation()).batches("train")
    drawn, row = same.make_training(0, 0, 1), mnist(tmp_path).batches("train").make_training(0, 0, 1)
    torch.testing.assert_close(drawn["pixels"], row["images"].flatten(2).transpose(1, 2)[:, order])


@pytest.mark.parametrize("seed", [None, 5])
def test_relevance_of_pixels_is_drawn_where_they_stand(seed: int | None, tmp_path: Path) -> None:
    from ssm_modal.plots import new_figure

    write_mnist(tmp_path, train=20, test=6)
    data = mnist(tmp_path, layout="pixels", permutation_seed=seed)
    read = data.example_input("test", 2)
    assert torch.equal(read, data.batches("test").make_evaluation(0, 0, 1)["pixels"][2:3])
    figure = new_figure(4, 2)
    data.draw_relevance(figure, "test", 2, read[0, :, 0])  # the pixels themselves, so the image comes back
    image = mnist(tmp_path).batches("test").make_evaluation(0, 0, 1)["images"][2]
    drawn = torch.from_numpy(np.asarray(figure.axes[1].images[1].get_array()))
    torch.testing.assert_close(drawn, image[0])


def test_cifar_s_three_colours(tmp_path: Path) -> None:
    images = write_cifar(tmp_path)
    data = ImageDataModule(
        str(tmp_path), source="cifar10", image_size=32, layout="pixels", val_images=2, batch_size=2
    )
    pixels = data.batches("validation").make_evaluation(0, 0, 1)["pixels"]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(pixels, (images[8:].float().flatten(1, 2) / 255 - mean) / std)
    grey = ImageDataModule(str(tmp_path), source="cifar10", image_size=32, channels=1, val_images=2)
    batch = grey.batches("test").make_evaluation(0, 0, 1)
    assert batch["images"].shape == (2, 1, 32, 32)
    assert grey.state_dict()["mean"] == [0.5]


def test_training_goes_through_every_image_once_an_epoch_and_is_a_function_of_the_index(
    tmp_path: Path,
) -> None:
    write_mnist(tmp_path, train=20)
    batches = mnist(tmp_path, augment=AUGMENT).batches("train")
    seen = torch.cat([batches.make_training(i, 0, 1)["recordings"] for i in range(15)])
    for epoch in seen.split(15):
        assert sorted(epoch.tolist()) == list(range(15))
    assert seen[:15].tolist() != seen[15:30].tolist()
    # Two processes take what one would, and any batch can be had again, in another process too.
    both = torch.cat([batches.make_training(2, rank, 2)["recordings"] for rank in (0, 1)])
    assert torch.equal(both, seen[16:24])
    again = pickle.loads(pickle.dumps(batches))
    torch.manual_seed(5)
    random.seed(5)
    for index in (9, 0):
        one, other = batches.make_training(index, 0, 1), again.make_training(index, 0, 1)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(batches.make_training(0, 0, 1)["images"], batches.make_training(1, 0, 1)["images"])
    other = mnist(tmp_path, augment=AUGMENT, seed=2).batches("train")
    assert not torch.equal(other.make_training(0, 0, 1)["images"], batches.make_training(0, 0, 1)["images"])


def test_augmentation_leaves_the_generators_as_they_were(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    batches = mnist(tmp_path, augment=AUGMENT).batches("train")
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    batches.make_training(0, 0, 1)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_a_folder_is_split_by_class(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"), each=8)
    data = folder(tmp_path)
    counts = {name: [s.label for s in data.samples(name)] for name in ("train", "validation", "test")}
    assert counts["test"] == ["cat"] * 2 + ["dog"] * 2 == counts["validation"]
    assert counts["train"] == ["cat"] * 4 + ["dog"] * 4
    batch = data.batches("train").make_training(0, 0, 1)
    red = batch["images"][:, 0].mean((1, 2)) > batch["images"][:, 2].mean((1, 2))
    assert torch.equal(red, batch["labels"] == 0)
    every = [str(file) for file in sorted(tmp_path.rglob("*.png"))]
    assert folder(tmp_path, predict="all").predicted_files() == every  # whatever their splits
    with pytest.raises(NotADirectoryError, match="a file, expected a folder with a folder a label in it"):
        folder(Path(every[0])).classes  # noqa: B018
    unlabelled = folder(tmp_path, source="unlabelled", predict="all")
    assert len(unlabelled.predicted_files()) == 16
    loader = unlabelled.predict_dataloader()
    assert {int(n) for b in loader for n in b["labels"]} == {-100}
    with pytest.raises(ValueError, match="source is \"unlabelled\" with predict 'test'"):
        folder(tmp_path, source="unlabelled")


def test_imagenet_s_layout_and_names(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path / split, ("n01", "n02", "n03"), each=1)
    torch.save(({"n01": ("tench", "Tinca"), "n02": ("crane",), "n03": ("crane",)}, []), tmp_path / "meta.bin")
    data = folder(tmp_path, source="imagenet")
    assert data.classes == ("tench (n01)", "crane (n02)", "crane (n03)")
    assert [s.label for s in data.samples("validation")] == list(data.classes)
    with pytest.raises(FileNotFoundError, match="no folder train in it"):
        folder(tmp_path / "train", source="imagenet").classes  # noqa: B018


def test_bad_images(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"), each=8)
    (tmp_path / "cat" / "bad.png").write_text("no image")
    (tmp_path / "emu").mkdir()
    with pytest.raises(ImageError, match="emu: is a class folder without an image"):
        folder(tmp_path).classes  # noqa: B018
    (tmp_path / "emu").rmdir()
    with pytest.raises(ImageError, match=r"bad\.png: cannot be read as an image"):
        folder(tmp_path).classes  # noqa: B018
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "only.png").write_text("no image")
    data = folder(tmp_path, skip_bad=True)
    with pytest.warns(UserWarning, match="2 files or folders were left out"):
        assert data.classes == ("cat", "dog")
    assert sorted(one.path.name for one in data.left_out) == ["bad.png", "only.png"]
    # Not checked beforehand, the file is named when its batch is made.
    late = folder(tmp_path, check_images=False, batch_size=30).batches("train")
    with pytest.raises(ImageError, match=r"\.png: cannot be read"):
        late.make_training(0, 0, 1)
    with pytest.raises(ValueError, match="skip_bad is true with check_images false"):
        folder(tmp_path, check_images=False, skip_bad=True)


def test_a_label_that_training_has_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("cat", "dog"), each=2)
    write_folder(tmp_path / "val", ("cat", "emu"), each=2)
    with pytest.raises(ImageError, match=r"val/emu: no training image has the label 'emu', expected one"):
        folder(tmp_path).classes  # noqa: B018
    data = folder(tmp_path, skip_bad=True)
    assert data.classes == ("cat", "dog")
    assert [s.label for s in data.samples("validation")] == ["cat", "cat"]
    assert [one.reason[:40] for one in data.left_out] == ["no training image has the label 'emu', e"] * 2
    assert folder(tmp_path, predict="all").classes == ("cat", "dog", "emu")


def test_a_checkpoint_of_another_input_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"), each=8)
    state = folder(tmp_path).state_dict()
    assert state["classes"] == ["cat", "dog"]
    fewer = folder(write_folder(tmp_path / "other", ("dog",), each=4))
    fewer.load_state_dict(state)
    assert fewer.classes == ("cat", "dog")
    with pytest.raises(ValueError, match=r"trained with image_size \[16, 16\], got \[20, 16\]"):
        folder(tmp_path / "other", image_size=[20, 16]).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "patches"}, "layout is 'patches', expected one of images, pixels"),
        ({"permutation_seed": 1}, "permutation_seed is 1 with layout 'images', expected layout \"pixels\""),
        ({"channels": 4}, r"channels is 4, expected 1 \(grey\) or 3 \(RGB\)"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"mean": [0.5]}, "mean holds 1 numbers, expected 3"),
        ({"image_size": [1, 2, 3]}, r"image_size is \(1, 2, 3\), expected one number"),
        ({"path": None}, "path is None with source 'folder'"),
        ({"source": "mnist", "suffixes": [".gif"]}, "suffixes is given with source 'mnist'"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0, expected above 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**{"path": "images", **options})


def test_grey_files_of_another_size_are_resized_and_cropped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((30, 60), 51, np.uint8)).save(tmp_path / "a" / "x.png")
    data = folder(tmp_path, channels=1, image_size=[8, 12], source="unlabelled", predict="all")
    batch = next(iter(data.predict_dataloader()))
    torch.testing.assert_close(batch["images"], torch.full((1, 1, 8, 12), -0.6))

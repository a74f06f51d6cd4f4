"""Reading images and image sets: values, layouts of folders, and what each error names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("timm")

import numpy as np
from PIL import Image

from ssm_modal.io.image_arrays import read_cifar, read_idx, read_mnist
from ssm_modal.io.image_transforms import ImageAugmentation, ImagePreprocessing, as_pixels, pixel_order
from ssm_modal.io.images import ImageError, find_images, read_image
from tests.datamodules.made_images import write_cifar, write_folder, write_idx, write_mnist


def test_an_image_is_read_in_the_channels_asked_for(tmp_path: Path) -> None:
    colour = np.zeros((2, 3, 3), np.uint8)
    colour[0, 1] = (255, 0, 10)
    file = tmp_path / "a.png"
    Image.fromarray(colour).save(file)
    assert np.array_equal(np.asarray(read_image(file)), colour)
    assert np.asarray(read_image(file, 1))[0].tolist() == [0, 77, 0]  # luma, ITU-R 601
    grey = tmp_path / "g.png"
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(grey)
    assert np.asarray(read_image(grey, 3)).tolist() == [[[9] * 3] * 2] * 2


def test_bad_images_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("no image")
    with pytest.raises(ImageError, match=r"a\.png: cannot be read as an image: no format .* expected PNG"):
        read_image(file)
    file.write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.png: the file is empty \(0 bytes\), expected an image"):
        read_image(file)
    whole = tmp_path / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(ImageError, match=r"b\.png: cannot be read as an image"):
        read_image(whole)
    deep = tmp_path / "c.png"
    Image.fromarray(np.full((2, 2), 1000, np.uint16)).save(deep)
    with pytest.raises(ImageError, match=r"c\.png: holds pixels of mode I.*, expected at most 8 bits"):
        read_image(deep)
    with pytest.raises(FileNotFoundError, match=r"d\.png"):
        read_image(tmp_path / "d.png")
    with pytest.raises(ValueError, match=r"channels is 2, expected 1 \(grey\) or 3 \(RGB\)"):
        read_image(whole, 2)
    again = pickle.loads(pickle.dumps(ImageError(file, "is bad")))
    assert (again.path, again.problem) == (file, "is bad")


def test_a_folder_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"), each=2)
    found = find_images(tmp_path)
    assert [(f.path.name, f.label, f.split) for f in found.files] == [
        ("cat0.png", "cat", None),
        ("cat1.png", "cat", None),
        ("dog0.png", "dog", None),
        ("dog1.png", "dog", None),
    ]
    assert {f.label for f in find_images(tmp_path, "none").files} == {None}
    (tmp_path / "emu").mkdir()
    with pytest.raises(ImageError, match=r"emu: is a class folder without an image"):
        find_images(tmp_path)
    (tmp_path / "lost.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"lost\.png: has no label: it stands in"):
        find_images(tmp_path)
    found = find_images(tmp_path, skip_bad=True)
    assert len(found.files) == 4
    assert [one.path.name for one in found.left_out] == ["lost.png", "emu"]


def test_a_folder_that_is_split_already(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("cat", "dog"), each=2)
    write_folder(tmp_path / "val", ("cat", "dog"), each=1)
    assert [(f.path.parent.name, f.split) for f in find_images(tmp_path).files] == [
        ("cat", "train"),
        ("cat", "train"),
        ("dog", "train"),
        ("dog", "train"),
        ("cat", "validation"),
        ("dog", "validation"),
    ]
    write_folder(tmp_path / "more", ("cat",), each=1)
    with pytest.raises(ImageError, match=r"cat0\.png: stands in none of train, val, validation, test below"):
        find_images(tmp_path)
    assert len(find_images(tmp_path, skip_bad=True).left_out) == 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_mnist(tmp_path: Path, zipped: bool, below: str) -> None:
    made = write_mnist(tmp_path / below, train=12, test=3, zipped=zipped)
    train, test = read_mnist(tmp_path, "train"), read_mnist(tmp_path, "test")
    assert torch.equal(train.images, made["train"])
    assert torch.equal(test.images, made["t10k"])
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert train.classes == tuple("0123456789")


def test_bad_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in it"
    ):
        read_mnist(tmp_path, "train")
    write_mnist(tmp_path, zipped=False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ImageError, match=r"holds 15695 bytes, expected 15696 for images \[20, 28, 28\]"):
        read_idx(file)
    file.write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match="begins with 89 50 4e 47, expected 00 00 08 01"):
        read_idx(file)
    write_mnist(tmp_path, zipped=True)
    zipped = tmp_path / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(zipped.read_bytes()[:-100])
    with pytest.raises(ImageError, match=r"\.gz: cannot be unpacked .*cut short"):
        read_idx(zipped)
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ImageError, match=r"holds \(3,\) labels, expected \(20,\)"):
        read_mnist(tmp_path, "train")
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.full((20,), 10, dtype=torch.uint8))
    with pytest.raises(ImageError, match="holds labels 10 to 10, expected 0 to 9"):
        read_mnist(tmp_path, "train")


@pytest.mark.parametrize(("name", "labels"), [("cifar10", [0, 9, 1, 9]), ("cifar100", [0, 9])])
def test_cifar(tmp_path: Path, name: str, labels: list[int]) -> None:
    images = write_cifar(tmp_path, name)
    train = read_cifar(tmp_path, name, "train")
    assert torch.equal(train.images, images)
    assert train.labels.tolist()[: len(labels)] == labels
    assert train.classes[3] == "class 3"
    assert len(read_cifar(tmp_path, name, "test")) == 2


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(
        ImageError, match=r"test_batch: cannot be read as a file of CIFAR \(it names builtins.print"
    ):
        read_cifar(tmp_path, "cifar10", "test")


# ------------------------------------------------------------ transforms


def test_evaluation_by_hand() -> None:
    about = ImagePreprocessing((2, 2), 1, (0.5,), (0.25,))
    image = Image.fromarray(np.array([[0, 255], [51, 102]], np.uint8))
    expected = torch.tensor([[[-2.0, 2.0], [-1.2, -0.4]]])
    out = about.evaluation()(image)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(about.undo(out)[..., 0], torch.tensor([[0.0, 1.0], [0.2, 0.4]]))
    # A centre crop of a wider image; and of 3/4 of it where crop_pct says so.
    wide = Image.fromarray(np.array([[0, 255, 0, 255, 0, 255]] * 2, np.uint8))
    assert about.evaluation()(wide).shape == (1, 2, 2)


def test_augmentation_is_timm_s_with_one_affine_map_before() -> None:
    about = ImagePreprocessing((8, 8), 3, (0.0,) * 3, (1.0,) * 3)
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    nothing = about.training(ImageAugmentation())
    torch.testing.assert_close(nothing(image), about.evaluation()(image))
    flipped = about.training(ImageAugmentation(hflip=1.0))
    torch.testing.assert_close(flipped(image), about.evaluation()(image).flip(-1))
    assert not torch.equal(about.training(ImageAugmentation(degrees=40))(image), nothing(image))
    with pytest.raises(ValueError, match=r"augment.scale is \(0.5, 1.2\), expected at most 1"):
        ImageAugmentation(scale=(0.5, 1.2))
    with pytest.raises(ValueError, match=r"augment\.zoom is 1, expected from 0 to 1"):
        ImageAugmentation(zoom=1)
    with pytest.raises(ValueError, match="auto_augment is 'rand-m9' with 1 channel"):
        ImagePreprocessing((8, 8), 1, (0.0,), (1.0,)).training(ImageAugmentation(auto_augment="rand-m9"))
    with pytest.raises(ValueError, match="mean holds 1 numbers, expected 3"):
        ImagePreprocessing((8, 8), 3, (0.0,), (1.0,) * 3)


def test_pixels_and_their_fixed_order() -> None:
    images = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2).float()
    plain = as_pixels(images, pixel_order(4, None))
    assert plain[0].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    order = pixel_order(4, 7)
    assert order is not None
    assert torch.equal(order, pixel_order(4, 7))
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert torch.equal(as_pixels(images, order), plain[:, order])
    # The one psmnist.yaml names, as it is on every machine.
    fixed = pixel_order(784, 92916)
    assert fixed is not None
    assert fixed[:5].tolist() == [573, 773, 173, 195, 184]
    assert not torch.equal(fixed, pixel_order(784, 0))

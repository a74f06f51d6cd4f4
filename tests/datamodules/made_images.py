"""Small files in the formats of the image sets."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def write_idx(file: Path, values: Tensor, *, zipped: bool = True) -> None:
    """`values` uint8 as an IDX file."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    data = head + values.contiguous().numpy().tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(data))
    else:
        file.write_bytes(data)


def write_mnist(folder: Path, train: int = 20, test: int = 6, *, zipped: bool = True) -> dict[str, Tensor]:
    """MNIST's four files; image i of a split has label i % 10. Returns the images by the files' beginning."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for begin, n in (("train", train), ("t10k", test)):
        images = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=generator)
        write_idx(folder / f"{begin}-images-idx3-ubyte", images, zipped=zipped)
        labels = (torch.arange(n) % 10).to(torch.uint8)
        write_idx(folder / f"{begin}-labels-idx1-ubyte", labels, zipped=zipped)
        found[begin] = images
    return found


def write_cifar(folder: Path, name: str = "cifar10") -> Tensor:
    """CIFAR's Python files with 2 images a batch; returns the training images (n, 32, 32, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    ten = name == "cifar10"
    inside = folder / ("cifar-10-batches-py" if ten else "cifar-100-python")
    inside.mkdir(parents=True)
    train = []
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for i, file in enumerate(files):
        data = torch.randint(256, (2, 3072), dtype=torch.uint8, generator=generator)
        labels = [i, 9]
        content = {b"data": data.numpy(), (b"labels" if ten else b"fine_labels"): labels}
        (inside / file).write_bytes(pickle.dumps(content, protocol=2))
        if not file.startswith("test"):
            train.append(data.view(2, 3, 32, 32).permute(0, 2, 3, 1))
    names = [f"class {i}" for i in range(10 if ten else 100)]
    meta = {b"label_names" if ten else b"fine_label_names": [n.encode() for n in names]}
    (inside / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return torch.cat(train)


def write_folder(
    root: Path, classes: Sequence[str], each: int = 4, size: tuple[int, int] = (40, 32), suffix: str = ".png"
) -> Path:
    """`each` images a class of `size` (width, height), noisy; the first class is red, the second blue."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for j in range(each):
            pixels = torch.randint(60, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
            pixels[..., 2 * (i % 2)] += 150
            Image.fromarray(pixels.numpy()).save(root / name / f"{name}{j}{suffix}")
    return root

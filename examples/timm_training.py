"""A timm training pipeline around Vision Mamba: transforms, loader, mixup, optimizer, schedule, average.

    pip install "ssm-modal[vision]"
    python examples/timm_training.py --images pictures --epochs 10 --out picture_model

`pictures` is a folder of images with a folder a class in it (torchvision's ImageFolder). Without --images a
small one is made: stripes that run either way.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import ssm_modal
import ssm_modal.models.vision_mamba  # registers the models with timm


def stripes(root: Path, size: int, each: int = 32) -> Path:
    """A folder of two classes: stripes from top to bottom, and from side to side."""
    for name, axis in (("down", 0), ("across", 1)):
        (root / name).mkdir(parents=True)
        for i in range(each):
            wave = (torch.arange(size) * (0.8 + 0.05 * i) + i).sin()
            pixels = wave.expand(size, size) if axis == 0 else wave[:, None].expand(size, size)
            grey = ((pixels + 1) * 127).to(torch.uint8)
            Image.fromarray(grey.contiguous().numpy()).convert("RGB").save(root / name / f"{i}.png")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="a folder of images, a folder a class")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 4")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", default="picture_model", help="the folder that gets the trained model")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = tempfile.TemporaryDirectory()
    images = options.images or str(stripes(Path(made.name) / "stripes", options.size))
    dataset = create_dataset("ImageFolder", root=images)
    n_classes = len(dataset.reader.class_to_idx)
    loader_options = {
        "input_size": (3, options.size, options.size),
        "batch_size": 16,
        "num_workers": 0,
        "use_prefetcher": False,
        "device": device,
    }
    loader = create_loader(
        dataset, is_training=True, scale=(0.8, 1.0), hflip=0.0, color_jitter=None, **loader_options
    )

    model = timm.create_model(
        "vim_mini_patch4_32",
        num_classes=n_classes,
        img_size=options.size,
        embed_dim=options.width,
        depth=options.depth,
        drop_path_rate=0.05,
    ).to(device)
    # timm asks the model which parameters take no weight decay, and how its layers follow each other.
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.9)
    schedule, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=1, warmup_lr=1e-4
    )
    mixup = Mixup(mixup_alpha=0.1, num_classes=n_classes, label_smoothing=0.05)
    average = ModelEmaV3(model, decay=0.9)
    criterion = SoftTargetCrossEntropy()

    for epoch in range(epochs):
        model.train()
        for x, target in loader:
            x, target = mixup(x.to(device), target.to(device))
            loss = criterion(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
        schedule.step(epoch + 1)

    # The data set's transform was training's; a new one gets evaluation's.
    right = total = 0
    with torch.no_grad():
        for x, target in create_loader(
            create_dataset("ImageFolder", root=images), is_training=False, **loader_options
        ):
            right += int((average.module.eval()(x.to(device)).argmax(1) == target.to(device)).sum())
            total += len(target)
    average.module.save_pretrained(options.out)
    loaded = ssm_modal.load_pretrained(options.out)
    size = sum(p.numel() for p in loaded.parameters())
    print(f"{right} of {total} training images right by a model of {size:,} parameters")


if __name__ == "__main__":
    main()

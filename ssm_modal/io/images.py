"""Image files: reading one, and finding labelled ones in a folder.

Pillow decodes (extra `vision`) and is imported where it is used. Where `skip_bad` is false the first bad file
is an error; where it is true bad files are left out and listed, each with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path, text_files

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# The folders of a folder that is already split, and the splits they hold.
SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_MODES = {1: "L", 3: "RGB"}
# Modes of more than 8 bits a channel, which converting would clip.
_DEEP = ("I", "F")


class ImageError(ValueError):
    """An image, or a folder of images, that cannot be used.

    path: the file or folder. problem: what came and what was expected, without the path.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        self.path, self.problem = Path(path), problem
        super().__init__(f"{self.path}: {problem}")

    def __reduce__(self) -> tuple[type[ImageError], tuple[Path, str]]:
        # Raised in a worker process, the error travels to the one that trains.
        return type(self), (self.path, self.problem)


@dataclass(frozen=True)
class ImageFile:
    """A file with what is known of it. label: its class, None where there is none. split: "train",
    "validation" or "test", None: not decided."""

    path: Path
    label: str | None = None
    split: str | None = None


@dataclass
class FoundImages:
    """Image files, and what was left out on the way to them."""

    files: list[ImageFile]
    left_out: list[LeftOut] = field(default_factory=list)


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Image:
    """The image in the file `path`, decoded, grey for 1 channel and RGB for 3; other files are converted, as
    torchvision's loader does (grey to three equal channels, colour to its luma, transparency dropped).

    Raises FileNotFoundError, and ImageError for a file that is no image, is cut short, or holds more than 8
    bits a channel.
    """
    if channels not in _MODES:
        raise ValueError(f"channels is {channels!r}, expected 1 (grey) or 3 (RGB)")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "ssm-modal[vision]"') from error
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: there is no such file")
    if file.stat().st_size == 0:
        raise ImageError(file, "the file is empty (0 bytes), expected an image")
    try:
        with Image.open(file) as image:
            if image.mode.startswith(_DEEP):
                raise ImageError(
                    file, f"holds pixels of mode {image.mode}, expected at most 8 bits a channel; convert it"
                )
            return image.convert(_MODES[channels])
    except ImageError:
        raise
    except UnidentifiedImageError:
        problem = "cannot be read as an image: no format that Pillow knows, expected PNG, JPEG or such"
        raise ImageError(file, problem) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise any of these for a file that is no image or a broken one.
        raise ImageError(file, f"cannot be read as an image ({error})") from None


def find_images(
    path: str | os.PathLike[str],
    labels: Literal["folder", "none"] = "folder",
    *,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    skip_bad: bool = False,
) -> FoundImages:
    """The images in the folder `path`, in the order of their relative paths, with their labels.

    labels: "folder": a folder a class (`path/cat/1.png`), as torchvision's ImageFolder has them; where `path`
        holds a folder `train`, it is split already: `path/train/cat/1.png`, and likewise `val` (or
        `validation`) and `test`. "none": any files, no labels.
    suffixes: endings of the files that are taken.

    Raises FileNotFoundError where there is no image, NotADirectoryError where labels by folder are asked of a
    file, ImageError for an image without a label and for a class
    folder without an image (or leaves them out).
    """
    if labels not in ("folder", "none"):
        raise ValueError(f'labels is {labels!r}, expected "folder" or "none"')
    root = expand_path(path)
    if labels == "folder" and root.is_file():
        raise NotADirectoryError(
            f"path is {str(root)!r}, a file, expected a folder with a folder a label in it"
        )
    files = text_files(root, suffixes)
    if labels == "none":
        return FoundImages([ImageFile(file) for file in files])
    if not (root / "train").is_dir():
        return _labelled(root, files, None, skip_bad)
    found = FoundImages([])
    for name, split in SPLIT_FOLDERS.items():
        folder = root / name
        if folder.is_dir():
            inside = [file for file in files if folder in file.parents]
            part = _labelled(folder, inside, split, skip_bad)
            found.files += part.files
            found.left_out += part.left_out
    outside = [f for f in files if f.relative_to(root).parts[0] not in SPLIT_FOLDERS]
    for file in outside:
        _bad(found.left_out, file, f"stands in none of {', '.join(SPLIT_FOLDERS)} below {root}", skip_bad)
    return found


def _labelled(root: Path, files: Sequence[Path], split: str | None, skip_bad: bool) -> FoundImages:
    found = FoundImages([])
    for file in files:
        inside = file.relative_to(root).parts
        if len(inside) < 2:
            problem = f"has no label: it stands in {root} itself, expected a folder named by the label"
            _bad(found.left_out, file, problem, skip_bad)
        else:
            found.files.append(ImageFile(file, inside[0], split))
    full = {one.label for one in found.files}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in full:
            problem = "is a class folder without an image, expected one or more, or no such folder"
            _bad(found.left_out, folder, problem, skip_bad)
    return found


def _bad(left_out: list[LeftOut], path: Path, problem: str, skip_bad: bool) -> None:
    if not skip_bad:
        raise ImageError(path, problem)
    left_out.append(LeftOut(path, problem))

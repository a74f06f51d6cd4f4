"""What a Vision Mamba is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ssm_modal.backbone import BackboneConfig
from ssm_modal.errors import ConfigError
from ssm_modal.layers.config import check_positive
from ssm_modal.models.base import ModelConfig
from ssm_modal.models.vision.positions import ClassToken
from ssm_modal.models.vision.scan_order import Grid, ScanOrder

if TYPE_CHECKING:
    from ssm_modal.models.vision.model import VisionMamba

GlobalPool = Literal["token", "avg", ""]


@dataclass(frozen=True)
class VisionMambaConfig(ModelConfig):
    """Vision Mamba (Zhu et al., arXiv 2401.09417).

    n_classes: 0 for no head. img_size, patch_size: pixels, one number for a square or [height, width]; the
    first a multiple of the second. in_chans: channels of the image. class_token: at the "head" or in the
    "middle" of the sequence, or "none". global_pool: what the head sees: the class "token", the "avg" of the
    patches, or "" for all tokens, unpooled; None: the token where there is one, else the average.
    scan_order: see `scan_order.py`. pos_drop_rate, drop_rate: dropout behind the positions and before the
    head. drop_path_rate: whole branches are left out, with a chance that grows from 0 in the first block to
    this in the last. dynamic_img_size: take images of any size that is a multiple of the patch, with the
    positions resampled at each call.
    """

    type: ClassVar[str] = "vision_mamba"
    n_classes: int
    backbone: BackboneConfig
    img_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    in_chans: int = 3
    class_token: ClassToken = "middle"
    global_pool: GlobalPool | None = None
    scan_order: ScanOrder = "row"
    pos_drop_rate: float = 0.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    dynamic_img_size: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "VisionMambaConfig"
        if self.n_classes < 0:
            raise ConfigError(f"{name}: n_classes is {self.n_classes}, expected 0 or more")
        check_positive(name, in_chans=self.in_chans)
        for field, size in (("img_size", self.img_size), ("patch_size", self.patch_size)):
            pair = (size,) if isinstance(size, int) else size
            if len(pair) > 2 or not pair or min(pair) < 1:
                raise ConfigError(f"{name}: {field} is {size!r}, expected a number of pixels or two of them")
        check_multiple(f"{name}: img_size", self.image, self.patch)
        for field in ("pos_drop_rate", "drop_rate", "drop_path_rate"):
            rate = getattr(self, field)
            if not 0 <= rate < 1:
                raise ConfigError(f"{name}: {field} is {rate}, expected 0 or more and below 1")
        if self.global_pool == "token" and self.class_token == "none":
            raise ConfigError(
                f'{name}: global_pool is "token" with class_token "none", expected "avg" or "", or a token'
            )

    @property
    def image(self) -> Grid:
        """(height, width) in pixels."""
        return _pair(self.img_size)

    @property
    def patch(self) -> Grid:
        """(height, width) of a patch in pixels."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> Grid:
        """(rows, columns) of patches."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def pool(self) -> GlobalPool:
        """`global_pool`, decided."""
        if self.global_pool is not None:
            return self.global_pool
        return "avg" if self.class_token == "none" else "token"

    @property
    def backbone_config(self) -> BackboneConfig:
        return self.backbone

    def build(self) -> VisionMamba:
        """Raises ImportError where timm, of the extra `vision`, is missing."""
        try:
            from ssm_modal.models.vision.model import VisionMamba
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("timm", "torchvision"):
                raise
            raise ImportError('Vision Mamba needs timm: pip install "ssm-modal[vision]"') from error
        return VisionMamba(self)


def check_multiple(what: str, image: Grid, patch: Grid) -> None:
    """Raise ConfigError unless both sides of `image` are whole numbers of patches, one or more."""
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ConfigError(
            f"{what} is {image[0]} x {image[1]} pixels, expected a multiple of the patch, "
            f"{patch[0]} x {patch[1]}"
        )


def _pair(size: int | tuple[int, ...]) -> Grid:
    if isinstance(size, int):
        return size, size
    return size[0], size[-1]

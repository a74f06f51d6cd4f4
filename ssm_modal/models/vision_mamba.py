"""Vision Mamba for timm: importing this module registers the models with timm's `create_model`.

    import timm, ssm_modal.models.vision_mamba
    model = timm.create_model("vim_tiny_patch16_224", num_classes=10, drop_path_rate=0.1)

Needs the extra `vision`. The same models are in this package's own registry, where
`ssm_modal.create_model("vim_tiny", n_classes=10)` and the shipped configs find them.
"""

from __future__ import annotations

from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ssm_modal.models.registry import model_config
from ssm_modal.models.vision.config import GlobalPool, VisionMambaConfig
from ssm_modal.models.vision.model import VisionMamba
from ssm_modal.models.vision.positions import ClassToken
from ssm_modal.models.vision.published import checkpoint_filter_fn
from ssm_modal.models.vision.scan_order import ScanOrder

__all__ = ["VisionMamba", "VisionMambaConfig", "checkpoint_filter_fn"]

# timm's name, and this package's.
_NAMES = {
    "vim_tiny_patch16_224": "vim_tiny",
    "vim_small_patch16_224": "vim_small",
    "vim_base_patch16_224": "vim_base",
    "vim_mini_patch4_32": "vim_mini_32",
    "vim_mini_patch4_28": "vim_mini",
}


def _default_cfg(name: str) -> dict[str, Any]:
    config = model_config(name)
    assert isinstance(config, VisionMambaConfig)
    return {
        "url": "",
        "num_classes": config.n_classes,
        "input_size": (config.in_chans, *config.image),
        "pool_size": None,
        "crop_pct": 0.9 if config.image == (224, 224) else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN if config.in_chans == 3 else (0.1307,),
        "std": IMAGENET_DEFAULT_STD if config.in_chans == 3 else (0.3081,),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({timm_name: _default_cfg(ours) for timm_name, ours in _NAMES.items()})


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """Through timm's builder, which takes its own options (features_only, out_indices, pretrained_cfg, ...)
    and hands the rest to `build`, which knows each by name."""

    def build(
        num_classes: int | None = None,
        in_chans: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        d_state: int | None = None,
        class_token: ClassToken | None = None,
        global_pool: GlobalPool | None = None,
        scan_order: ScanOrder | None = None,
        drop_rate: float | None = None,
        pos_drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        dynamic_img_size: bool | None = None,
    ) -> VisionMamba:
        given = {
            "n_classes": num_classes,
            "in_chans": in_chans,
            "img_size": img_size,
            "patch_size": patch_size,
            "d_model": embed_dim,
            "n_layers": depth,
            "d_state": d_state,
            "class_token": class_token,
            "global_pool": global_pool,
            "scan_order": scan_order,
            "drop_rate": drop_rate,
            "pos_drop_rate": pos_drop_rate,
            "drop_path_rate": drop_path_rate,
            "dynamic_img_size": dynamic_img_size,
        }
        config = model_config(_NAMES[variant], **{k: v for k, v in given.items() if v is not None})
        assert isinstance(config, VisionMambaConfig)
        return config.build()

    build.__qualname__ = variant  # what an error calls it, for an option that it has not
    out_indices: int | tuple[int, ...] = options.pop("out_indices", 3)
    feature_cls: Literal["getter"] = "getter"
    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": feature_cls},
        **options,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti of arXiv 2401.09417, 7 M parameters."""
    return _create("vim_tiny_patch16_224", pretrained, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S of arXiv 2401.09417, 26 M parameters."""
    return _create("vim_small_patch16_224", pretrained, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B of arXiv 2401.09417, 98 M parameters."""
    return _create("vim_base_patch16_224", pretrained, kwargs)


@register_model
def vim_mini_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """For colour images of 32 x 32 pixels, 10 classes."""
    return _create("vim_mini_patch4_32", pretrained, kwargs)


@register_model
def vim_mini_patch4_28(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """For grey images of 28 x 28 pixels, 10 classes."""
    return _create("vim_mini_patch4_28", pretrained, kwargs)

"""The registered models of images: numbers only.

`pixels_classifier` and `pixels_classifier_s4d` are small models to be sized by overrides.
"""

from __future__ import annotations

from ssm_modal.backbone import BackboneConfig
from ssm_modal.layers import BidirectionalConfig, MambaConfig, S4DConfig, VectorsConfig
from ssm_modal.models.classifier import SequenceClassifierConfig
from ssm_modal.models.registry import register_model
from ssm_modal.models.vision import VisionMambaConfig


def _vision_mamba(d_model: int) -> VisionMambaConfig:
    """The sizes of arXiv 2401.09417, table 1: 24 blocks, both directions under one pair of projections."""
    return VisionMambaConfig(n_classes=1000, backbone=_both_ways(d_model, 24))


def _both_ways(d_model: int, n_layers: int) -> BackboneConfig:
    return BackboneConfig(
        d_model=d_model,
        n_layers=n_layers,
        mixer=MambaConfig(),
        bidirectional=BidirectionalConfig(combine="mean", share="projections"),
    )


@register_model
def vim_tiny() -> VisionMambaConfig:
    """Vision Mamba, tiny, as published."""
    return _vision_mamba(192)


@register_model
def vim_small() -> VisionMambaConfig:
    """Vision Mamba, small, as published."""
    return _vision_mamba(384)


@register_model
def vim_base() -> VisionMambaConfig:
    """Vision Mamba, base, as published."""
    return _vision_mamba(768)


@register_model
def vim_mini() -> VisionMambaConfig:
    """Vision Mamba for grey images of 28 x 28 pixels, in patches of 4."""
    return VisionMambaConfig(n_classes=10, backbone=_both_ways(128, 8), img_size=28, patch_size=4, in_chans=1)


@register_model
def vim_mini_32() -> VisionMambaConfig:
    """Vision Mamba for colour images of 32 x 32 pixels, in patches of 4."""
    return VisionMambaConfig(n_classes=10, backbone=_both_ways(192, 12), img_size=32, patch_size=4)


@register_model
def pixels_classifier() -> SequenceClassifierConfig:
    """Images as sequences of single pixels, both directions, mean pooling; to be sized by overrides."""
    return SequenceClassifierConfig(
        n_classes=10,
        backbone=_both_ways(128, 4),
        input=VectorsConfig(channels=1),
    )


@register_model
def pixels_classifier_s4d() -> SequenceClassifierConfig:
    """The time-invariant baseline of pixels_classifier, of its size at the same d_model and n_layers."""
    return SequenceClassifierConfig(
        n_classes=10,
        backbone=BackboneConfig(
            d_model=128,
            n_layers=4,
            mixer=S4DConfig(),
            bidirectional=BidirectionalConfig(combine="mean", share="projections"),
        ),
        input=VectorsConfig(channels=1),
    )

"""Backbones over (batch, length, d_model), knowing no modality: a stack of pre-norm residual blocks, a U-Net
of such stacks at several rates (SaShiMi), and WaveNet as the baseline beside it."""

from ssm_modal.backbone.backbone import Backbone, BackboneState
from ssm_modal.backbone.base import BackboneBase, BackboneBaseConfig
from ssm_modal.backbone.block import Block
from ssm_modal.backbone.config import BackboneConfig
from ssm_modal.backbone.sashimi import Sashimi, SashimiConfig, SashimiState
from ssm_modal.backbone.segmented import iterate_segments, sum_over_segments
from ssm_modal.backbone.segments import Segment
from ssm_modal.backbone.wavenet import WaveNet, WaveNetConfig, WaveNetState

__all__ = [
    "Backbone",
    "BackboneBase",
    "BackboneBaseConfig",
    "BackboneConfig",
    "BackboneState",
    "Block",
    "Sashimi",
    "SashimiConfig",
    "SashimiState",
    "Segment",
    "WaveNet",
    "WaveNetConfig",
    "WaveNetState",
    "iterate_segments",
    "sum_over_segments",
]

"""The backbone: a stack of pre-norm residual blocks over (batch, length, d_model), knowing no modality."""

from ssm_modal.backbone.backbone import Backbone, BackboneState
from ssm_modal.backbone.block import Block
from ssm_modal.backbone.config import BackboneConfig
from ssm_modal.backbone.segmented import iterate_segments, sum_over_segments
from ssm_modal.backbone.segments import Segment

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneState",
    "Block",
    "Segment",
    "iterate_segments",
    "sum_over_segments",
]

"""The backbone: a stack of pre-norm residual blocks over (batch, length, d_model), knowing no modality."""

from ssm_modal.backbone.backbone import Backbone, BackboneState
from ssm_modal.backbone.block import Block
from ssm_modal.backbone.config import BackboneConfig

__all__ = ["Backbone", "BackboneConfig", "BackboneState", "Block"]

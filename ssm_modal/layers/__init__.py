"""Layers: what makes vectors of ids and waveforms; mixers along the length (Mamba, S4D, attention, either
bidirectional); MLP, mixture of experts and RMSNorm."""

from ssm_modal.layers.attention import Attention, AttentionConfig, AttentionState
from ssm_modal.layers.bidirectional import Bidirectional, BidirectionalConfig
from ssm_modal.layers.config import Config
from ssm_modal.layers.feed_forward import FeedForward, FeedForwardConfig
from ssm_modal.layers.filterbank import FilterbankConfig
from ssm_modal.layers.inputs import (
    IdsConfig,
    InputConfig,
    StridedWaveformConfig,
    VectorsConfig,
    WaveformConfig,
)
from ssm_modal.layers.mamba import Mamba, MambaConfig, MambaState
from ssm_modal.layers.mixer import Mixer, MixerConfig, build_mixer
from ssm_modal.layers.mlp import MLP, MLPConfig
from ssm_modal.layers.moe import MoE, MoEConfig, collect_routing, load_balancing_loss
from ssm_modal.layers.norm import RMSNorm
from ssm_modal.layers.reverse_complement import Strands, StrandsConfig
from ssm_modal.layers.s4d import S4D, S4DConfig, S4DState, set_time_step_scale
from ssm_modal.layers.spec_augment import SpecAugmentConfig

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionState",
    "Bidirectional",
    "BidirectionalConfig",
    "Config",
    "FeedForward",
    "FeedForwardConfig",
    "FilterbankConfig",
    "IdsConfig",
    "InputConfig",
    "MLP",
    "MLPConfig",
    "Mamba",
    "MambaConfig",
    "MambaState",
    "Mixer",
    "MixerConfig",
    "MoE",
    "MoEConfig",
    "RMSNorm",
    "S4D",
    "S4DConfig",
    "S4DState",
    "SpecAugmentConfig",
    "Strands",
    "StrandsConfig",
    "StridedWaveformConfig",
    "VectorsConfig",
    "WaveformConfig",
    "build_mixer",
    "collect_routing",
    "load_balancing_loss",
    "set_time_step_scale",
]

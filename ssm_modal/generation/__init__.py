"""Generation: reading the prompts, the step loop, sampling."""

from __future__ import annotations

from ssm_modal.generation.config import GenerationConfig
from ssm_modal.generation.loop import GenerationResult, generate
from ssm_modal.generation.prompts import CausalModel, prefill
from ssm_modal.generation.saved_state import load_state, save_state
from ssm_modal.generation.stopping import StopMatcher
from ssm_modal.generation.streaming import StreamingClassifier
from ssm_modal.generation.waveforms import GeneratedWaveform, generate_waveforms

__all__ = [
    "CausalModel",
    "GeneratedWaveform",
    "GenerationConfig",
    "GenerationResult",
    "StopMatcher",
    "StreamingClassifier",
    "generate",
    "generate_waveforms",
    "load_state",
    "prefill",
    "save_state",
]

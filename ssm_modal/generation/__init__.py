"""Generation: reading the prompts, the step loop, sampling."""

from __future__ import annotations

from ssm_modal.generation.config import GenerationConfig
from ssm_modal.generation.loop import GenerationResult, generate
from ssm_modal.generation.prompts import CausalModel, prefill
from ssm_modal.generation.saved_state import load_state, save_state
from ssm_modal.generation.stopping import StopMatcher

__all__ = [
    "CausalModel",
    "GenerationConfig",
    "GenerationResult",
    "StopMatcher",
    "generate",
    "load_state",
    "prefill",
    "save_state",
]

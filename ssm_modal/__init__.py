"""Selective state-space models for long sequences of any kind, on one shared backbone.

The names below are imported when first used, so that `import ssm_modal` is quick and needs no GPU and no
extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_modal.attribution import Attribution, attribute
    from ssm_modal.backbone import Backbone, BackboneConfig, BackboneState
    from ssm_modal.checkpoints import load_pretrained, save_pretrained
    from ssm_modal.errors import CheckpointError, ConfigError, StateError
    from ssm_modal.kernels.sequences import Sequences
    from ssm_modal.models import (
        CausalLM,
        CausalLMConfig,
        create_model,
        list_models,
        model_config,
        register_model,
    )
    from ssm_modal.state import State

__version__ = "0.1.0"

_HOME = {
    "Attribution": "ssm_modal.attribution",
    "Backbone": "ssm_modal.backbone",
    "BackboneConfig": "ssm_modal.backbone",
    "BackboneState": "ssm_modal.backbone",
    "CausalLM": "ssm_modal.models",
    "CausalLMConfig": "ssm_modal.models",
    "CheckpointError": "ssm_modal.errors",
    "ConfigError": "ssm_modal.errors",
    "Sequences": "ssm_modal.kernels.sequences",
    "State": "ssm_modal.state",
    "StateError": "ssm_modal.errors",
    "attribute": "ssm_modal.attribution",
    "create_model": "ssm_modal.models",
    "list_models": "ssm_modal.models",
    "load_pretrained": "ssm_modal.checkpoints",
    "model_config": "ssm_modal.models",
    "register_model": "ssm_modal.models",
    "save_pretrained": "ssm_modal.checkpoints",
}

__all__ = [
    "Attribution",
    "Backbone",
    "BackboneConfig",
    "BackboneState",
    "CausalLM",
    "CausalLMConfig",
    "CheckpointError",
    "ConfigError",
    "Sequences",
    "State",
    "StateError",
    "attribute",
    "create_model",
    "list_models",
    "load_pretrained",
    "model_config",
    "register_model",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ssm_modal' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

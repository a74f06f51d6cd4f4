"""The published formats by name, and which of them a config.json or a model's config is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssm_modal.checkpoints.falcon_mamba import FALCON_MAMBA
from ssm_modal.checkpoints.family import Family
from ssm_modal.checkpoints.jamba import JAMBA
from ssm_modal.checkpoints.mamba import MAMBA
from ssm_modal.checkpoints.state_spaces import STATE_SPACES
from ssm_modal.errors import CheckpointError, nearest
from ssm_modal.layers import MambaConfig
from ssm_modal.models import CausalLMConfig
from ssm_modal.models.base import FORMAT

TRANSFORMERS = {family.name: family for family in (MAMBA, FALCON_MAMBA, JAMBA)}  # by their model_type


def family_of_document(document: Mapping[str, Any], source: str) -> Family:
    """The family that a config.json is of; raises CheckpointError, naming what it says, for none."""
    kind = document.get("model_type")
    if kind in TRANSFORMERS:
        if document.get("quantization_config") is not None:
            raise CheckpointError(
                f"{source} describes quantised weights (quantization_config), expected plain ones"
            )
        return TRANSFORMERS[kind]
    if kind is None and "ssm_cfg" in document:
        return STATE_SPACES
    if kind is None:
        raise CheckpointError(
            f"{source} is no config of a model known here: it has neither 'format': {FORMAT!r} nor a "
            f"'model_type' ({', '.join(TRANSFORMERS)}) nor 'ssm_cfg'"
        )
    architectures = document.get("architectures")
    named = f" ({', '.join(map(str, architectures))})" if isinstance(architectures, list) else ""
    raise CheckpointError(
        f"{source} has the unknown model_type {kind!r}{named}; {nearest(str(kind), TRANSFORMERS)}"
    )


def family_of_config(config: CausalLMConfig) -> Family:
    """The family of transformers that a model is of, if any of them is; its `write` says why not."""
    mixers = [config.stack.mixer_of(i) for i in range(config.stack.n_layers)]
    mamba_alone = all(isinstance(m, MambaConfig) for m in mixers)
    if not mamba_alone or any(config.stack.mlp_of(i) is not None for i in range(len(mixers))):
        return JAMBA
    normed = any(isinstance(m, MambaConfig) and m.bc_dt_norm_eps is not None for m in mixers)
    return FALCON_MAMBA if normed else MAMBA

"""Falcon-Mamba (arXiv 2410.05355) as transformers keeps it: Mamba with a weightless RMS norm on dt, B and C.

Keys and defaults: transformers' FalconMambaConfig and FalconMambaForCausalLM.
"""

from __future__ import annotations

from typing import Any

from ssm_modal.checkpoints.family import Family, Fields, Problems
from ssm_modal.checkpoints.mamba import parts_mamba, read_mamba, rename_embedding, write_mamba
from ssm_modal.layers import MambaConfig
from ssm_modal.models import CausalLMConfig


def read_falcon_mamba(fields: Fields) -> CausalLMConfig:
    """The config.json of model_type "falcon_mamba"."""
    return read_mamba(fields, norm_eps=fields.get("mixer_rms_eps", float, 1e-6))


def write_falcon_mamba(config: CausalLMConfig) -> dict[str, Any]:
    """Its config.json."""
    written = write_mamba(config, "falcon_mamba")
    mamba = config.stack.mixer_of(0)
    assert isinstance(mamba, MambaConfig)
    problems = Problems("falcon_mamba")
    problems.expect(mamba.bc_dt_norm_eps is not None, "it has no norms on dt, B and C")
    problems.check()
    return {**written, "mixer_rms_eps": mamba.bc_dt_norm_eps}


FALCON_MAMBA = Family(
    name="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    read=read_falcon_mamba,
    write=write_falcon_mamba,
    parts=parts_mamba,
    rename=rename_embedding,
)

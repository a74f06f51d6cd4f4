"""Mamba (arXiv 2312.00752) as transformers keeps it: model_type "mamba".

Keys and defaults: transformers' MambaConfig and MambaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ssm_modal.backbone import BackboneConfig
from ssm_modal.checkpoints.family import (
    Family,
    Fields,
    Part,
    Problems,
    dt_rank_of,
    mamba_parts,
    one_mixer,
    vocabulary_rows,
)
from ssm_modal.errors import CheckpointError
from ssm_modal.layers import MambaConfig
from ssm_modal.models import CausalLMConfig


def read_mamba(fields: Fields, norm_eps: float | None = None) -> CausalLMConfig:
    """norm_eps: of a weightless RMS norm on dt, B and C, None without one."""
    fields.must_be("hidden_act", "silu", "swish")
    d_model = fields.get("hidden_size", int)
    return CausalLMConfig(
        vocab_size=fields.get("vocab_size", int),
        tie_embeddings=fields.get("tie_word_embeddings", bool, True),
        backbone=BackboneConfig(
            d_model=d_model,
            n_layers=fields.get("num_hidden_layers", int),
            mixer=MambaConfig(
                d_state=fields.get("state_size", int, 16),
                d_conv=fields.get("conv_kernel", int, 4),
                expand=_expand(fields, d_model),
                dt_rank="auto" if _auto(fields) else fields.get("time_step_rank", int),
                dt_min=fields.get("time_step_min", float, 0.001),
                dt_max=fields.get("time_step_max", float, 0.1),
                dt_init_floor=fields.get("time_step_floor", float, 1e-4),
                conv_bias=fields.get("use_conv_bias", bool, True),
                bias=fields.get("use_bias", bool, False),
                bc_dt_norm_eps=norm_eps,
            ),
            norm_eps=fields.get("layer_norm_epsilon", float, 1e-5),
            residual_in_fp32=fields.get("residual_in_fp32", bool, True),
        ),
    )


def _auto(fields: Fields) -> bool:
    return fields.document.get("time_step_rank", "auto") == "auto"


def _expand(fields: Fields, d_model: int) -> int:
    """From the width itself where it is there: Falcon-Mamba's files give a wrong `expand` beside it."""
    d_inner = fields.get("intermediate_size", int, fields.get("expand", int, 2) * d_model)
    if d_inner % d_model:
        raise CheckpointError(
            f"{fields.source}: intermediate_size is {d_inner}, expected a multiple of hidden_size {d_model}"
        )
    return d_inner // d_model


def write_mamba(config: CausalLMConfig, family: str = "mamba") -> dict[str, Any]:
    """family: "mamba", or "falcon_mamba" for the norms on dt, B and C."""
    backbone, problems = config.stack, Problems(family)
    mamba = one_mixer(config, MambaConfig, problems)
    layers = range(backbone.n_layers)
    problems.expect(
        all(isinstance(backbone.mixer_of(i), MambaConfig) for i in layers), "a layer is no Mamba layer"
    )
    problems.expect(all(backbone.mlp_of(i) is None for i in layers), "it has MLPs or experts")
    problems.expect(not mamba.bc_dt_norm_weights, "its norms on dt, B and C have weights")
    if family == "mamba":
        problems.expect(mamba.bc_dt_norm_eps is None, "it has norms on dt, B and C")
    problems.check()
    return {
        "vocab_size": vocabulary_rows(config),
        "hidden_size": backbone.d_model,
        "num_hidden_layers": backbone.n_layers,
        "state_size": mamba.d_state,
        "conv_kernel": mamba.d_conv,
        "expand": mamba.expand,
        "intermediate_size": mamba.expand * backbone.d_model,
        "time_step_rank": dt_rank_of(config, mamba),
        "time_step_min": mamba.dt_min,
        "time_step_max": mamba.dt_max,
        "time_step_floor": mamba.dt_init_floor,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": backbone.norm_eps,
        "residual_in_fp32": backbone.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
    }


def parts_mamba(
    config: CausalLMConfig, keys: Collection[str] = (), embedding: str = "backbone.embeddings.weight"
) -> list[Part]:
    """embedding: the key of the token embedding."""
    mamba = config.stack.mixer_of(0)
    assert isinstance(mamba, MambaConfig)
    parts = [Part(embedding, "embedding.weight"), Part("backbone.norm_f.weight", "backbone.norm.weight")]
    for i in range(config.stack.n_layers):
        layer = f"backbone.layers.{i}"
        parts.append(Part(f"{layer}.norm.weight", f"{layer}.norm.weight"))
        parts += mamba_parts(mamba, f"{layer}.mixer", f"{layer}.mixer")
    if not config.tie_embeddings:
        parts.append(Part("lm_head.weight", "head.proj.weight"))
    return parts


def rename_embedding(key: str) -> str:
    """Files of before transformers 4.39, and state-spaces' own, have the embedding in the singular."""
    return key.replace("backbone.embedding.", "backbone.embeddings.")


MAMBA = Family(
    name="mamba",
    architecture="MambaForCausalLM",
    read=read_mamba,
    write=write_mamba,
    parts=parts_mamba,
    rename=rename_embedding,
)

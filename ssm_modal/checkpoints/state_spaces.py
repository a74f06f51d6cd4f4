"""Mamba as its authors keep it: config.json with `ssm_cfg`, and pytorch_model.bin.

Keys and defaults: mamba_ssm's MambaConfig (mamba_ssm/models/config_mamba.py) and Mamba module.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ssm_modal.backbone import BackboneConfig
from ssm_modal.checkpoints.family import Family, Fields, Part, Problems, dt_rank_of, one_mixer
from ssm_modal.checkpoints.mamba import parts_mamba, write_mamba
from ssm_modal.errors import CheckpointError
from ssm_modal.layers import MambaConfig
from ssm_modal.models import CausalLMConfig

NORM_EPS = 1e-5  # of every norm; the config has no word for it

_SSM_KEYS = {
    "d_state",
    "d_conv",
    "expand",
    "dt_rank",
    "dt_min",
    "dt_max",
    "dt_init_floor",
    "conv_bias",
    "bias",
}
# How weights start, and which kernels run: nothing that a trained model depends on.
_IGNORED = {"layer", "dt_init", "dt_scale", "use_fast_path"}


def read_state_spaces(fields: Fields) -> CausalLMConfig:
    """A config.json with `ssm_cfg`."""
    fields.must_be("rms_norm", True)
    fields.must_be("d_intermediate", 0)
    fields.must_be("attn_layer_idx", [], None)
    ssm = Fields(fields.get("ssm_cfg", dict, {}), f"{fields.source}: ssm_cfg")
    ssm.must_be("layer", "Mamba1")
    unknown = sorted(ssm.document.keys() - _SSM_KEYS - _IGNORED)
    if unknown:
        raise CheckpointError(f"{ssm.source} has the unknown keys {', '.join(unknown)}")
    rank = ssm.document.get("dt_rank", "auto")
    return CausalLMConfig(
        vocab_size=fields.get("vocab_size", int),
        pad_vocab_multiple=fields.get("pad_vocab_size_multiple", int, 8),
        tie_embeddings=fields.get("tie_embeddings", bool, True),
        backbone=BackboneConfig(
            d_model=fields.get("d_model", int),
            n_layers=fields.get("n_layer", int),
            mixer=MambaConfig(
                d_state=ssm.get("d_state", int, 16),
                d_conv=ssm.get("d_conv", int, 4),
                expand=ssm.get("expand", int, 2),
                dt_rank="auto" if rank == "auto" else ssm.get("dt_rank", int),
                dt_min=ssm.get("dt_min", float, 0.001),
                dt_max=ssm.get("dt_max", float, 0.1),
                dt_init_floor=ssm.get("dt_init_floor", float, 1e-4),
                conv_bias=ssm.get("conv_bias", bool, True),
                bias=ssm.get("bias", bool, False),
            ),
            norm_eps=NORM_EPS,
            residual_in_fp32=fields.get("residual_in_fp32", bool, True),
        ),
    )


def write_state_spaces(config: CausalLMConfig) -> dict[str, Any]:
    """A config.json that `mamba_ssm.MambaLMHeadModel.from_pretrained` reads."""
    write_mamba(config)  # the same restrictions
    backbone, problems = config.stack, Problems("state_spaces")
    problems.expect(
        backbone.norm_eps == NORM_EPS, f"its norm_eps is {backbone.norm_eps}, expected {NORM_EPS}"
    )
    mamba = one_mixer(config, MambaConfig, problems)
    problems.check()
    return {
        "d_model": backbone.d_model,
        "d_intermediate": 0,
        "n_layer": backbone.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba1",
            "d_state": mamba.d_state,
            "d_conv": mamba.d_conv,
            "expand": mamba.expand,
            "dt_rank": dt_rank_of(config, mamba),
            "dt_min": mamba.dt_min,
            "dt_max": mamba.dt_max,
            "dt_init_floor": mamba.dt_init_floor,
            "conv_bias": mamba.conv_bias,
            "bias": mamba.bias,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": backbone.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def parts_state_spaces(config: CausalLMConfig, keys: Collection[str] = ()) -> list[Part]:
    """As transformers', with the embedding in the singular."""
    return parts_mamba(config, keys, "backbone.embedding.weight")


STATE_SPACES = Family(
    name="state_spaces",
    architecture="",
    read=read_state_spaces,
    write=write_state_spaces,
    parts=parts_state_spaces,
)

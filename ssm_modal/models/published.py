"""The registered sizes of published language models: numbers only.

Mamba: arXiv 2312.00752, table 12. Falcon-Mamba: arXiv 2410.05355. Jamba: arXiv 2403.19887, 2408.12570. The
numbers are those of the published config.json files.
"""

from __future__ import annotations

from ssm_modal.backbone import BackboneConfig
from ssm_modal.layers import AttentionConfig, MambaConfig, MLPConfig, MoEConfig
from ssm_modal.models.causal_lm import CausalLMConfig
from ssm_modal.models.registry import register_model


def _mamba(d_model: int, n_layers: int) -> CausalLMConfig:
    """The GPT-NeoX vocabulary padded to a multiple of 8, tied."""
    return CausalLMConfig(
        vocab_size=50280,
        backbone=BackboneConfig(d_model=d_model, n_layers=n_layers, mixer=MambaConfig()),
        pad_vocab_multiple=8,
    )


@register_model
def mamba_130m() -> CausalLMConfig:
    """mamba-130m."""
    return _mamba(768, 24)


@register_model
def mamba_370m() -> CausalLMConfig:
    """mamba-370m."""
    return _mamba(1024, 48)


@register_model
def mamba_790m() -> CausalLMConfig:
    """mamba-790m."""
    return _mamba(1536, 48)


@register_model
def mamba_1_4b() -> CausalLMConfig:
    """mamba-1.4b."""
    return _mamba(2048, 48)


@register_model
def mamba_2_8b() -> CausalLMConfig:
    """mamba-2.8b."""
    return _mamba(2560, 64)


@register_model
def falcon_mamba_7b() -> CausalLMConfig:
    """falcon-mamba-7b and -instruct: Mamba with a weightless RMS norm on dt, B and C."""
    return CausalLMConfig(
        vocab_size=65024,
        tie_embeddings=False,
        backbone=BackboneConfig(d_model=4096, n_layers=64, mixer=MambaConfig(bc_dt_norm_eps=1e-6)),
    )


def _jamba(
    vocab_size: int, d_model: int, n_layers: int, d_hidden: int, attention: AttentionConfig, moe: MoEConfig
) -> CausalLMConfig:
    """One attention layer in eight, the fifth, without positions; experts in every second layer."""
    mamba = MambaConfig(bc_dt_norm_eps=1e-6, bc_dt_norm_weights=True)
    return CausalLMConfig(
        vocab_size=vocab_size,
        tie_embeddings=False,
        backbone=BackboneConfig(
            d_model=d_model,
            n_layers=n_layers,
            mixer=(*(mamba,) * 4, attention, *(mamba,) * 3),
            mlp=(MLPConfig(d_hidden=d_hidden), moe),
            norm_eps=1e-6,
        ),
    )


def _jamba_52b() -> CausalLMConfig:
    return _jamba(
        vocab_size=65536,
        d_model=4096,
        n_layers=32,
        d_hidden=14336,
        attention=AttentionConfig(n_heads=32, n_kv_heads=8, rope_theta=None),
        moe=MoEConfig(n_experts=16, top_k=2, d_hidden=14336),
    )


@register_model
def jamba_v0_1() -> CausalLMConfig:
    """Jamba-v0.1."""
    return _jamba_52b()


@register_model
def jamba_1_5_mini() -> CausalLMConfig:
    """Jamba-1.5-Mini, of the architecture of Jamba-v0.1."""
    return _jamba_52b()


@register_model
def jamba_lm() -> CausalLMConfig:
    """Jamba over bytes, to be sized by overrides."""
    return _jamba(
        vocab_size=256,
        d_model=256,
        n_layers=8,
        d_hidden=512,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, rope_theta=None),
        moe=MoEConfig(n_experts=8, top_k=2, d_hidden=512),
    )

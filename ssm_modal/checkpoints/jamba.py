"""Jamba (arXiv 2403.19887) as transformers keeps it: attention among Mamba layers, experts among MLPs.

Keys and defaults: transformers' JambaConfig and JambaForCausalLM. Files hold each expert on its own, as they
always did; a folder with the experts stacked, as transformers 5 has them in memory, is read too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
from ssm_modal.layers import AttentionConfig, FeedForwardConfig, MambaConfig, MLPConfig, MoEConfig
from ssm_modal.layers.mixer import MixerConfig
from ssm_modal.models import CausalLMConfig


def read_jamba(fields: Fields) -> CausalLMConfig:
    """The config.json of model_type "jamba"."""
    fields.must_be("hidden_act", "silu", "swish")
    fields.must_be("sliding_window", None)
    eps = fields.get("rms_norm_eps", float, 1e-6)
    rank = fields.document.get("mamba_dt_rank", "auto")
    heads = fields.get("num_attention_heads", int, 32)
    d_hidden = fields.get("intermediate_size", int, 14336)
    mamba = MambaConfig(
        d_state=fields.get("mamba_d_state", int, 16),
        d_conv=fields.get("mamba_d_conv", int, 4),
        expand=fields.get("mamba_expand", int, 2),
        dt_rank="auto" if rank == "auto" else fields.get("mamba_dt_rank", int),
        conv_bias=fields.get("mamba_conv_bias", bool, True),
        bias=fields.get("mamba_proj_bias", bool, False),
        bc_dt_norm_eps=eps,
        bc_dt_norm_weights=True,
    )
    attention = AttentionConfig(
        n_heads=heads,
        n_kv_heads=fields.get("num_key_value_heads", int, heads),
        head_dim=fields.get("head_dim", int) if fields.document.get("head_dim") is not None else None,
        rope_theta=None,
    )
    mlp = MLPConfig(d_hidden=d_hidden)
    n_experts = fields.get("num_experts", int, 16)
    moe: FeedForwardConfig = mlp  # one expert is none to choose from
    if n_experts > 1:
        moe = MoEConfig(
            n_experts=n_experts,
            top_k=fields.get("num_experts_per_tok", int, 2),
            d_hidden=d_hidden,
            aux_loss_coef=fields.get("router_aux_loss_coef", float, 0.001),
        )
    mixer: tuple[MixerConfig, ...] = _pattern(fields, "attn_layer", (8, 4), attention, mamba)
    return CausalLMConfig(
        vocab_size=fields.get("vocab_size", int, 65536),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        backbone=BackboneConfig(
            d_model=fields.get("hidden_size", int, 4096),
            n_layers=fields.get("num_hidden_layers", int, 32),
            mixer=mixer,
            mlp=_pattern(fields, "expert_layer", (2, 1), moe, mlp),
            norm_eps=eps,
        ),
    )


def _pattern(fields: Fields, what: str, default: tuple[int, int], chosen: Any, other: Any) -> tuple[Any, ...]:
    """`chosen` at `what`_offset of each `what`_period layers, `other` at the rest."""
    period = fields.get(f"{what}_period", int, default[0])
    offset = fields.get(f"{what}_offset", int, default[1])
    if not 0 <= offset < period:
        raise CheckpointError(
            f"{fields.source}: {what}_offset is {offset}, expected 0 or more and below {what}_period {period}"
        )
    return tuple(chosen if i == offset else other for i in range(period))


def write_jamba(config: CausalLMConfig) -> dict[str, Any]:
    """Its config.json."""
    backbone, problems = config.stack, Problems("jamba")
    layers = range(backbone.n_layers)
    mixers, mlps = [backbone.mixer_of(i) for i in layers], [backbone.mlp_of(i) for i in layers]
    mamba = one_mixer(config, MambaConfig, problems)
    attention = one_mixer(config, AttentionConfig, problems)
    moes = {m for m in mlps if isinstance(m, MoEConfig)}
    dense = {m for m in mlps if isinstance(m, MLPConfig)}
    problems.expect(
        all(isinstance(m, (MambaConfig, AttentionConfig)) for m in mixers), "a layer is of another kind"
    )
    if MambaConfig in {type(m) for m in mixers}:
        problems.expect(
            mamba.bc_dt_norm_weights, "its Mamba layers have no norms with weights on dt, B and C"
        )
        problems.expect(
            mamba.bc_dt_norm_eps in (None, backbone.norm_eps),
            f"bc_dt_norm_eps is {mamba.bc_dt_norm_eps}, expected norm_eps {backbone.norm_eps}",
        )
    if AttentionConfig in {type(m) for m in mixers}:
        problems.expect(attention.rope_theta is None, "its attention has rotary positions")
        problems.expect(not attention.bias, "its attention has biases")
    problems.expect(None not in mlps, "a layer has no MLP")
    problems.expect(
        all(m.activation == "swiglu" and not m.bias for m in dense), "its MLPs are no plain SwiGLU"
    )
    widths = {m.hidden(backbone.d_model) for m in dense} | {m.hidden(backbone.d_model) for m in moes}
    problems.expect(len(widths) <= 1, f"its MLPs and experts have different widths, {sorted(widths)}")
    problems.expect(1 not in {m.n_experts for m in moes}, "it has a single expert")
    attends = _period([isinstance(m, AttentionConfig) for m in mixers])
    expert = _period([isinstance(m, MoEConfig) for m in mlps])
    problems.expect(attends is not None, "its attention layers do not stand at equal distances")
    problems.expect(expert is not None, "its experts do not stand at equal distances")
    problems.check()
    assert attends is not None
    assert expert is not None
    moe = next(iter(moes), MoEConfig())
    written = {
        "vocab_size": vocabulary_rows(config),
        "hidden_size": backbone.d_model,
        "num_hidden_layers": backbone.n_layers,
        "intermediate_size": next(iter(widths)),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1],
        "expert_layer_period": expert[0],
        "expert_layer_offset": expert[1],
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_coef,
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": mamba.expand,
        "mamba_dt_rank": dt_rank_of(config, mamba),
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "hidden_act": "silu",
        "rms_norm_eps": backbone.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return written if attention.head_dim is None else {**written, "head_dim": attention.head_dim}


def _period(chosen: list[bool]) -> tuple[int, int] | None:
    """(period, offset) such that layer i is chosen where i % period == offset; None where there is none."""
    n = len(chosen)
    return next(
        (
            (period, offset)
            for period in range(1, n + 2)  # n + 1, offset n: none of them
            for offset in range(period)
            if all(c == (i % period == offset) for i, c in enumerate(chosen))
        ),
        None,
    )


_MAMBA_NORMS = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
_MLP = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "out_proj"}


def parts_jamba(config: CausalLMConfig, keys: Collection[str] = ()) -> list[Part]:
    """With the experts stacked where `keys` has them so."""
    stacked = any(key.endswith(".experts.gate_up_proj") for key in keys)
    experts: Callable[..., Iterator[Part]] = _stacked if stacked else _separate
    parts = [
        Part("model.embed_tokens.weight", "embedding.weight"),
        Part("model.final_layernorm.weight", "backbone.norm.weight"),
    ]
    backbone = config.stack
    for i in range(backbone.n_layers):
        key, name = f"model.layers.{i}", f"backbone.layers.{i}"
        parts.append(Part(f"{key}.input_layernorm.weight", f"{name}.norm.weight"))
        parts.append(Part(f"{key}.pre_ff_layernorm.weight", f"{name}.mlp_norm.weight"))
        mixer, mlp = backbone.mixer_of(i), backbone.mlp_of(i)
        if isinstance(mixer, MambaConfig):
            parts += mamba_parts(mixer, f"{key}.mamba", f"{name}.mixer")
            parts += _renamed(f"{key}.mamba", f"{name}.mixer", _MAMBA_NORMS)
        else:
            parts += _renamed(f"{key}.self_attn", f"{name}.mixer", _ATTENTION)
        if isinstance(mlp, MoEConfig):
            parts.append(Part(f"{key}.feed_forward.router.weight", f"{name}.mlp.router.weight"))
            d_hidden = mlp.hidden(backbone.d_model)
            parts += experts(f"{key}.feed_forward.experts", f"{name}.mlp.experts", mlp.n_experts, d_hidden)
        else:
            parts += _renamed(f"{key}.feed_forward", f"{name}.mlp", _MLP)
    if not config.tie_embeddings:
        parts.append(Part("lm_head.weight", "head.proj.weight"))
    return parts


def _renamed(key: str, name: str, names: dict[str, str]) -> Iterator[Part]:
    for theirs, ours in names.items():
        yield Part(f"{key}.{theirs}.weight", f"{name}.{ours}.weight")


def _separate(key: str, name: str, n_experts: int, d_hidden: int) -> Iterator[Part]:
    for e in range(n_experts):
        yield Part(f"{key}.{e}.gate_proj.weight", f"{name}.gate_up_proj", (e, slice(0, d_hidden)))
        yield Part(f"{key}.{e}.up_proj.weight", f"{name}.gate_up_proj", (e, slice(d_hidden, None)))
        yield Part(f"{key}.{e}.down_proj.weight", f"{name}.out_proj", (e,))


def _stacked(key: str, name: str, n_experts: int, d_hidden: int) -> Iterator[Part]:
    yield Part(f"{key}.gate_up_proj", f"{name}.gate_up_proj")
    yield Part(f"{key}.down_proj", f"{name}.out_proj")


JAMBA = Family(
    name="jamba",
    architecture="JambaForCausalLM",
    read=read_jamba,
    write=write_jamba,
    parts=parts_jamba,
)

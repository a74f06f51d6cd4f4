"""Small published models with random weights, as transformers makes them, for the tests of loading, saving
and parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# (family, config): odd sizes, biases on and off, tied and untied, periods and offsets.
MAMBA: list[dict[str, Any]] = [
    {"hidden_size": 20, "state_size": 3, "num_hidden_layers": 2},
    {"hidden_size": 24, "state_size": 5, "num_hidden_layers": 3, "use_bias": True, "expand": 3},
    {"hidden_size": 18, "state_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": False},
    {"hidden_size": 33, "state_size": 7, "num_hidden_layers": 2, "use_conv_bias": False, "conv_kernel": 3},
    {
        "hidden_size": 16,
        "state_size": 8,
        "num_hidden_layers": 4,
        "time_step_rank": 5,
        "layer_norm_epsilon": 1e-3,
    },
    {
        "hidden_size": 22,
        "state_size": 4,
        "num_hidden_layers": 2,
        "residual_in_fp32": False,
        "use_bias": True,
        "tie_word_embeddings": False,
        "conv_kernel": 2,
    },
]
FALCON_MAMBA = [
    {**config, "mixer_rms_eps": eps} for config, eps in zip(MAMBA, (1e-6, 1e-3, 1e-2, 1e-5, 1e-6, 0.1))
]
JAMBA: list[dict[str, Any]] = [
    {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    {"attn_layer_period": 3, "attn_layer_offset": 0, "num_experts": 3, "num_experts_per_tok": 1},
    {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 1, "mamba_proj_bias": True},
    {
        "mamba_conv_bias": False,
        "tie_word_embeddings": True,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    {"num_experts": 1, "attn_layer_period": 1, "attn_layer_offset": 0, "num_hidden_layers": 2},
    {"mamba_d_state": 5, "mamba_dt_rank": 3, "mamba_expand": 3, "mamba_d_conv": 3, "intermediate_size": 19},
    {"attn_layer_period": 4, "attn_layer_offset": 3, "expert_layer_period": 3, "num_hidden_layers": 4},
]
JAMBA_BASE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "mamba_d_state": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
CASES = [
    *(("mamba", config) for config in MAMBA),
    *(("falcon_mamba", config) for config in FALCON_MAMBA),
    *(("jamba", config) for config in JAMBA),
]
VOCAB = 37


def theirs(family: str, config: dict[str, Any], seed: int = 2) -> Any:
    """A model of transformers in eval mode, its weights drawn so that every one matters."""
    import transformers

    kind = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "jamba": "Jamba"}[family]
    base = JAMBA_BASE if family == "jamba" else {}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    made = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **ids, **{**base, **config})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    if family == "jamba":
        model.set_experts_implementation("eager")  # the other one refuses widths that are no multiple of 4
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name:
                p.normal_(std=0.5)
            elif p.ndim >= 2 and "A_log" not in name:
                p.normal_(std=1.5 * p.shape[-1] ** -0.5)
            else:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def their_logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def their_tokens(model: Any, prompt: Tensor, n: int) -> list[int]:
    """Greedily chosen, (1, length) given."""
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, eos_token_id=None)
    return out[0, prompt.shape[1] :].tolist()


def edit_json(path: Path, **changes: Any) -> None:
    """Keys of a JSON file changed; None removes one."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

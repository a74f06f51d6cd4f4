"""LoRA by peft on every projection: gradients, merging, files both ways, on packed weights, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ssm_modal
from ssm_modal.checkpoints.adapters import (
    LoraSettings,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from ssm_modal.errors import CheckpointError
from ssm_modal.generation import GenerationConfig, generate
from ssm_modal.layers import AttentionConfig, MambaConfig, MLPConfig, MoEConfig
from ssm_modal.models import CausalLM, CausalLMConfig

peft = pytest.importorskip("peft")
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
PROJECTIONS = {
    "mixer.in_proj": 4,
    "mixer.x_proj": 4,
    "mixer.dt_proj": 4,
    "mixer.out_proj": 6,
    "mixer.q_proj": 2,
    "mixer.k_proj": 2,
    "mixer.v_proj": 2,
    "mlp.gate_proj": 4,
    "mlp.up_proj": 4,
    "mlp.out_proj": 4,
    "mlp.experts": 4,
}


def jamba(width: int = 16) -> CausalLM:
    """Two Mamba layers and one of attention, experts in the middle one."""
    mamba = MambaConfig(d_state=4, bc_dt_norm_eps=1e-6, bc_dt_norm_weights=True)
    backbone = ssm_modal.BackboneConfig(
        d_model=width,
        n_layers=3,
        mixer=(mamba, AttentionConfig(n_heads=4, n_kv_heads=2, rope_theta=None), mamba),
        mlp=(MLPConfig(), MoEConfig(n_experts=4, top_k=2, d_hidden=width), MLPConfig()),
    )
    return CausalLMConfig(vocab_size=40, backbone=backbone, tie_embeddings=False).build().eval()


def trained(model: nn.Module) -> None:
    """B away from zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def test_every_projection_has_an_adapter_with_gradients() -> None:
    model = jamba()
    before = model(IDS)[0].detach()
    add_lora(model)
    assert torch.equal(model(IDS)[0], before)
    trained(model)
    out = model(IDS)[0]
    assert not torch.allclose(out, before, atol=0.1)
    out.square().sum().backward()
    counted = dict.fromkeys(PROJECTIONS, 0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
            counted[".".join(name.split(".")[3:5])] += 1
    assert counted == PROJECTIONS


def test_merged_equals_unmerged_and_is_a_plain_model() -> None:
    model = jamba().double()
    names = list(model.state_dict())
    add_lora(model, LoraSettings(rank=3, alpha=5))
    trained(model)
    with torch.no_grad():
        out = model(IDS)[0]
        tokens = generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=5, temperature=0)).tokens
        merge_adapter(model)
        torch.testing.assert_close(model(IDS)[0], out, rtol=1e-10, atol=1e-10)
    assert generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=5, temperature=0)).tokens == tokens
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_adapter(model)


def test_files_go_both_ways_between_here_and_peft(tmp_path: Path) -> None:
    model = jamba()
    model.save_pretrained(tmp_path / "model")
    config = add_lora(model, LoraSettings(rank=2))
    trained(model)
    out = model(IDS)[0].detach()
    save_adapter(model, config, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 0.7 * (tmp_path / "model" / "model.safetensors").stat().st_size
    again: Any = ssm_modal.load_pretrained(tmp_path / "model")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS)[0], out)
    theirs = peft.PeftModel.from_pretrained(
        ssm_modal.load_pretrained(tmp_path / "model"), str(tmp_path / "adapter")
    )
    assert torch.equal(theirs(IDS)[0], out)
    # What peft writes is read here.
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = ssm_modal.load_pretrained(tmp_path / "model")
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS)[0], out)


def test_an_adapter_on_packed_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    jamba(64).save_pretrained(tmp_path)
    model: Any = ssm_modal.load_pretrained(tmp_path, quantize="int4")
    before = model(IDS)[0].detach()
    add_lora(model, LoraSettings(dropout=0.1))  # no experts among the targets: dropout may be
    trained(model)
    model(IDS)[0].square().sum().backward()
    found = [n for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0]
    assert len(found) == sum(PROJECTIONS.values()) - PROJECTIONS["mlp.experts"]
    assert not torch.allclose(model(IDS)[0], before, atol=0.1)
    with pytest.raises(ValueError, match="has packed weights, which an adapter"):
        merge_adapter(model)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    model = jamba()
    with pytest.raises(ValueError, match=r"targets holds 'in_prj', .* did you mean 'in_proj'"):
        add_lora(model, LoraSettings(targets=("in_prj",)))
    with pytest.raises(ValueError, match=r"dropout is 0\.1, expected 0 with experts"):
        add_lora(model, LoraSettings(dropout=0.1))
    for settings, word in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1}, "dropout is 1"),
    ):
        with pytest.raises(ValueError, match=f"lora.{word}"):
            LoraSettings(**settings)
    config = add_lora(model, LoraSettings(targets=("in_proj",)))
    assert sum("lora_A" in n for n, _ in model.named_parameters()) == 2
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model)
    save_adapter(model, config, tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="holds files"):
        save_adapter(model, config, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"in_proj.lora_A.weight \(8, 16\), expected \(8, 64\)"):
        load_adapter(jamba(64), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"holds no adapter: adapter_config\.json and"):
        load_adapter(jamba(), tmp_path)
    with pytest.raises(ValueError, match="has no adapter; add_lora"):
        save_adapter(jamba(), config, tmp_path / "new")
    assert not (tmp_path / "new").exists()

"""Published architectures beside transformers, with random weights: what is loaded here, and what is saved
here and loaded there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.generation import GenerationConfig, generate
from tests.ssm_modal.published import CASES, VOCAB, their_logits, their_tokens, theirs
from tests.tolerances import assert_close, relative_error

transformers = pytest.importorskip("transformers")


def ids(batch: int = 4, length: int = 33) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))


def same_there(folder: Path, model: Any, tokens: torch.Tensor) -> Any:
    """transformers' model from `folder`, checked to be `model` to the bit."""
    experts = {"experts_implementation": "eager"} if model.config.model_type == "jamba" else {}
    back = transformers.AutoModelForCausalLM.from_pretrained(folder, **experts).eval()
    assert type(back) is type(model)
    mine, want = back.state_dict(), model.state_dict()
    assert mine.keys() == want.keys()
    assert all(torch.equal(mine[key], want[key]) for key in want)
    assert torch.equal(their_logits(back, tokens), their_logits(model, tokens))
    return back


@torch.no_grad()
def our_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)[0]


@pytest.mark.parametrize(("family", "config"), CASES)
def test_equals_transformers_both_ways(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    there = theirs(family, config)
    there.save_pretrained(tmp_path / "theirs")
    ours = ssm_modal.load_pretrained(tmp_path / "theirs")
    want = their_logits(there, ids())
    assert_close(our_logits(ours, ids()), want, 1e-4, "logits")

    prompt = ids()[:1, :5]
    settings = GenerationConfig(max_new_tokens=64, temperature=0, stop_at_eos=False)
    tokens = their_tokens(there, prompt, 64)
    assert len(set(tokens)) > 4, "a model that says one thing shows nothing"
    assert generate(ours, [prompt[0]], settings).tokens[0] == tokens

    ssm_modal.save_pretrained(ours, tmp_path / "ours", format="transformers")
    same_there(tmp_path / "ours", there, ids())

    allowed = 1.5 * relative_error(their_logits(there.to(torch.bfloat16), ids()), want)
    half = ssm_modal.load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert relative_error(our_logits(half, ids()), want) <= allowed


SWEEP = [
    (attention, expert)
    for attention in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    for expert in ((1, 0), (2, 0), (2, 1), (3, 2))
]


@pytest.mark.parametrize(("attention", "expert"), SWEEP)
def test_every_jamba_period_and_offset(
    attention: tuple[int, int], expert: tuple[int, int], tmp_path: Path
) -> None:
    config = {
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": expert[0],
        "expert_layer_offset": expert[1],
    }
    there = theirs("jamba", config)
    there.save_pretrained(tmp_path / "theirs")
    ours = ssm_modal.load_pretrained(tmp_path / "theirs")
    tokens = ids(2, 9)
    assert_close(our_logits(ours, tokens), their_logits(there, tokens), 1e-4, "logits")
    ssm_modal.save_pretrained(ours, tmp_path / "ours", format="transformers")
    back = same_there(tmp_path / "ours", there, tokens)
    assert back.config.layers_block_type == there.config.layers_block_type
    assert back.config.layers_num_experts == there.config.layers_num_experts

"""What a model is said to take, against the tensors it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.cli.main import main
from ssm_modal.cli.memory import PUBLISHED
from ssm_modal.errors import StateError
from ssm_modal.models import CausalLM, ModelMemory, memory_table, model_memory
from tests.test_readme import ROOT

MODELS: dict[str, dict[str, Any]] = {
    "mamba_lm": {"d_model": 16, "n_layers": 3},
    "jamba_lm": {"d_model": 16, "n_layers": 6, "n_heads": 2, "n_kv_heads": 1},
    "s4d_lm": {"d_model": 16, "n_layers": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_equals_what_a_model_allocates(name: str, dtype: torch.dtype) -> None:
    model = ssm_modal.create_model(name, **MODELS[name]).to(dtype)
    assert isinstance(model, CausalLM)
    sizes = set()
    for batch, length in ((1, 5), (3, 5), (1, 40)):
        with torch.no_grad():
            _, state = model(torch.zeros(batch, length, dtype=torch.int64))
        assert state is not None
        said = model_memory(model.config, length, batch=batch, dtype=dtype)
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        assert said.weights == size(model.parameters())
        assert said.parameters == sum(p.numel() for p in model.parameters())
        assert said.state + said.cache == size(state.tensors())
        assert said.total == said.weights + size(state.tensors())
        assert (said.cache > 0) == (name == "jamba_lm")
        sizes.add((batch, said.state))
    assert len(sizes) == 2, "the state grows with the batch alone"


def test_a_negative_length_is_named() -> None:
    config = ssm_modal.model_config("mamba_lm")
    with pytest.raises(ValueError, match=r"length is -1 and batch 1, expected 0 or more"):
        model_memory(config, -1)


@pytest.mark.parametrize("name", ["audio_classifier", "caduceus_ps", "dna_cnn"])
def test_a_model_without_a_state_is_refused(name: str) -> None:
    with pytest.raises(StateError, match=r"describes a model that carries no state"):
        model_memory(ssm_modal.model_config(name), 1)


def test_the_table_s_units() -> None:
    table = memory_table(["jamba_v0_1"], [262_144], dtype=torch.bfloat16)
    # 4 layers x 2 x 8 heads x 128 x 2 bytes x 2^18 tokens: the 4 GB of arXiv 2403.19887, table 1.
    assert table.splitlines()[2].endswith("| 4.00 GiB |")
    said = model_memory(ssm_modal.model_config("jamba_v0_1"), 262_144)
    assert isinstance(said, ModelMemory)
    assert said.cache == 4 << 30
    assert f"{said.weights / 2**30:.2f} GiB" in table
    assert "| none |" in memory_table(["mamba_130m"], [7])


def test_the_guide_s_table_is_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(PUBLISHED)
    assert table in (ROOT / "docs" / "published_models.md").read_text(encoding="utf-8")
    assert main(["memory", "mamba_13m"]) == 2
    assert "did you mean 'mamba_130m'" in capsys.readouterr().err

"""States after a prefix: read at once or token by token, kept, forked, saved; decoding as a graph does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.errors import CheckpointError, StateError
from ssm_modal.generation import GenerationConfig, decode, generate, load_state, prefill, save_state
from ssm_modal.layers import AttentionConfig, MambaConfig, MLPConfig, MoEConfig, attention
from ssm_modal.models import CausalLM, CausalLMConfig, model_memory
from ssm_modal.tokenizers import ByteTokenizer
from tests.tolerances import assert_close

FAMILIES = {
    "mamba": (MambaConfig(d_state=4), None),
    "falcon_mamba": (MambaConfig(d_state=4, bc_dt_norm_eps=1e-6), None),
    "jamba": (
        (
            MambaConfig(d_state=4, bc_dt_norm_eps=1e-6, bc_dt_norm_weights=True),
            AttentionConfig(n_heads=4, n_kv_heads=2, rope_theta=None),
        ),
        (MLPConfig(), MoEConfig(n_experts=4, top_k=2, d_hidden=16)),
    ),
    "rotary": (AttentionConfig(n_heads=2), None),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]
GREEDY = GenerationConfig(max_new_tokens=9, temperature=0)


def small(family: str, seed: int = 3) -> CausalLM:
    torch.manual_seed(seed)
    mixer, mlp = FAMILIES[family]
    backbone = ssm_modal.BackboneConfig(d_model=16, n_layers=2, mixer=mixer, mlp=mlp)
    model = CausalLMConfig(vocab_size=300, backbone=backbone, tie_embeddings=False).build()
    with torch.no_grad():
        for weight in (model.embedding.weight, *model.head.parameters()):
            weight.normal_()
        for block in model.backbone.layers:
            for weight in block.residual_weights():
                weight.mul_(8)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_token_at_a_time_gives_the_state_of_the_whole(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = small(family).to(dtype)
    logits, state = prefill(model, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        own = model.init_state(1)
        for token in prompt:
            last = model.step_(torch.tensor([[token]]), own)
        assert_close(logits[row], last[0, -1], tolerance)
        for a, b in zip(state.select([row]).tensors(), own.tensors()):
            if a.ndim == 4:  # a cache: the slots that are taken
                a, b = a[:, :, : len(prompt)], b[:, :, : len(prompt)]
            assert_close(a, b, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_state_goes_on_as_if_it_had_read_the_prefix(family: str, tmp_path: Path) -> None:
    model = small(family)
    whole = generate(model, [[1, 2, 3, 4, 5], [1, 2, 3, 6]], GREEDY).tokens
    _, state = prefill(model, [[1, 2, 3]])
    file = save_state(model, state, tmp_path / "prefix.safetensors")
    again = load_state(model, file)
    assert [type(a) for a in again.layers] == [type(a) for a in state.layers]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), state.tensors()))
    # One prefix, forked for two continuations.
    assert generate(model, [[4, 5], [6]], GREEDY, state=again.select([0, 0])).tokens == whole
    # In half precision what is wide stays wide.
    half = small(family).bfloat16()
    _, state = prefill(half, PROMPTS)
    again = load_state(half, save_state(half, state, tmp_path / "half.safetensors"))
    assert [t.dtype for t in again.tensors()] == [t.dtype for t in state.tensors()]
    assert again.batch_size == 3


def test_a_state_of_another_model_or_a_broken_file_is_refused(tmp_path: Path) -> None:
    model = small("mamba")
    _, state = prefill(model, [[1, 2]])
    file = save_state(model, state, tmp_path / "state.safetensors")
    with pytest.raises(StateError, match="is the state of another model: its fingerprint is"):
        load_state(small("mamba", seed=4), file)
    with pytest.raises(StateError, match="another model"):
        load_state(small("rotary"), file)
    changed = small("mamba")
    with torch.no_grad():
        changed.backbone.layers[1].mixer.out_proj.weight[0, 0] += 1  # type: ignore[union-attr, index]
    with pytest.raises(StateError, match="another model"):
        load_state(changed, file)
    short = tmp_path / "short.safetensors"
    short.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"short.safetensors cannot be read as a saved state"):
        load_state(model, short)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds no saved state"):
        load_state(model, tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_state(model, tmp_path / "none")
    with pytest.raises(StateError, match="state is a MambaState, expected a BackboneState"):
        save_state(model, state.layers[0], tmp_path / "layer.safetensors")  # type: ignore[attr-defined]
    assert not (tmp_path / "layer.safetensors").exists()


def test_memory_of_the_state_does_not_grow_with_the_prompt() -> None:
    model = small("mamba")
    sizes = []
    for length in (1, 50, 3000):
        _, state = prefill(model, [[1] * length], prefill_tokens=512)
        sizes.append(sum(t.untyped_storage().nbytes() for t in state.tensors()))
    expected = model_memory(model.config, 3000, dtype=torch.float32)
    assert sizes[0] == sizes[1] == sizes[2] == expected.state
    assert expected.cache == 0
    # Of a hybrid the cache alone grows, to whole blocks of slots.
    model = small("jamba")
    _, state = prefill(model, [[1] * 3000], prefill_tokens=512)
    slots = -(-3000 // attention.BLOCK) * attention.BLOCK
    memory = model_memory(model.config, slots, dtype=torch.float32)
    assert sum(t.untyped_storage().nbytes() for t in state.tensors()) == memory.state + memory.cache


@pytest.mark.parametrize("pieces", [1, 40, 1 << 24])
def test_attention_over_the_cache_in_pieces_of_the_mask(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MASK_ELEMENTS", pieces)
    model = small("jamba").double()
    whole = torch.cat([model(torch.tensor([p]))[0][:, -1] for p in PROMPTS])
    for budget in (3, 7, 100):
        logits, state = prefill(model, PROMPTS, prefill_tokens=budget)
        assert_close(logits, whole, 1e-10)
        more, _ = prefill(model, [[9, 8], [7], [6, 5, 4, 3]], state=state, prefill_tokens=budget)
        for row, tail in enumerate([[9, 8], [7], [6, 5, 4, 3]]):
            assert_close(more[row], model(torch.tensor([PROMPTS[row] + tail]))[0][0, -1], 1e-10)


@pytest.fixture
def as_a_graph(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The decoder as on CUDA, but that its graph is the step itself; counts what is captured."""
    captures = []

    def captured(step, warm_up, device):  # type: ignore[no-untyped-def]
        captures.append(1)
        warm_up()
        warm_up()
        decoder = step.__self__

        places = [t.data_ptr() for t in decoder.state.tensors()]

        def replay() -> None:
            used = [layer.used for layer in decoder.state.layers if hasattr(layer, "used")]
            step()
            # A graph changes nothing on the host.
            for layer, before in zip((y for y in decoder.state.layers if hasattr(y, "used")), used):
                layer.advance_(before - layer.used)
            assert [t.data_ptr() for t in decoder.state.tensors()] == places, "a graph's buffers moved"

        for layer in decoder.state.layers:  # as the recording leaves it
            layer.advance_(1)
        return replay

    monkeypatch.setattr(decode, "can_capture", lambda device: True)
    monkeypatch.setattr(decode, "captured", captured)
    monkeypatch.setattr(decode, "BLOCK", 4)
    return captures


SAMPLED = GenerationConfig(max_new_tokens=9, top_k=20, repetition_penalty=1.3, seed=7)
LONG = dataclasses.replace(GREEDY, max_new_tokens=260)  # more than a block of a cache


@pytest.mark.parametrize(
    ("family", "config"),
    [*((family, config) for family in FAMILIES for config in (GREEDY, SAMPLED)), ("rotary", LONG)],
)
def test_a_graph_gives_the_same_tokens_and_states(
    family: str, config: GenerationConfig, as_a_graph: list[int]
) -> None:
    model = small(family)
    result = generate(model, PROMPTS, config, return_states=True)
    assert as_a_graph == [1]
    plain = generate(model, PROMPTS, dataclasses.replace(config, cuda_graph=False), return_states=True)
    assert as_a_graph == [1]
    assert result.tokens == plain.tokens
    assert result.states is not None
    assert plain.states is not None
    for prompt, a, b in zip(PROMPTS, result.states, plain.states):
        for layer in a.layers:  # type: ignore[attr-defined]
            if hasattr(layer, "used"):  # a bound for all rows, and no more
                assert layer.used == max(map(len, PROMPTS)) + config.max_new_tokens
                assert layer.lengths.tolist() == [len(prompt) + config.max_new_tokens]
        more = [generate(model, [[3, 4]], GREEDY, state=s).tokens for s in (a, b)]
        assert more[0] == more[1]
    # Rows that end at different tokens, in the middle of a block.
    eos = plain.tokens[0][5]
    ending = dataclasses.replace(config, eos_id=eos)
    result, plain = (
        generate(model, PROMPTS, dataclasses.replace(ending, cuda_graph=graph)) for graph in (True, False)
    )
    assert (result.tokens, result.finish) == (plain.tokens, plain.finish)
    assert "eos" in result.finish
    result = generate(model, PROMPTS, ending, return_states=True)
    assert result.states is not None
    for prompt, tokens, state in zip(PROMPTS, result.tokens, result.states):
        again = generate(model, [[3, 4]], GREEDY, state=state).tokens
        assert again == generate(model, [prompt + tokens + [3, 4]], GREEDY).tokens


def test_streaming_and_stop_texts_with_a_graph(as_a_graph: list[int]) -> None:
    model, tokenizer = small("mamba"), ByteTokenizer()
    config = GenerationConfig(max_new_tokens=20, temperature=0)
    prompts = [list(b"ab"), list(b"x")]
    told: list[tuple[int, int]] = []
    whole = generate(
        model, prompts, config, tokenizer=tokenizer, on_token=lambda row, token: told.append((row, token))
    )
    assert as_a_graph
    assert [[t for r, t in told if r == row] for row in range(2)] == whole.tokens
    assert whole.texts is not None
    stop = next(c for c in whole.texts[0][4:] if c != "\ufffd")
    cut = generate(model, prompts, dataclasses.replace(config, stop=(stop,)), tokenizer=tokenizer)
    assert cut.texts is not None
    assert cut.texts[0] == whole.texts[0][: whole.texts[0].index(stop)]
    assert cut.finish[0] == "stop"


def test_a_step_that_cannot_be_captured_is_said_and_runs(
    as_a_graph: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(step, warm_up, device):  # type: ignore[no-untyped-def]
        step.__self__.state.layers[0].advance_(1)  # it fails on the way
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode, "captured", refuses)
    model = small("rotary")
    with pytest.warns(
        UserWarning, match="cannot be a CUDA graph, so its kernels are launched one by one: op"
    ):
        result = generate(model, PROMPTS, GREEDY, return_states=True)
    assert result.states is not None
    used = [layer.used for layer in result.states[0].layers]  # type: ignore[attr-defined]
    assert used == [max(map(len, PROMPTS)) + GREEDY.max_new_tokens] * 2
    assert result.tokens == generate(model, PROMPTS, dataclasses.replace(GREEDY, cuda_graph=False)).tokens


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_give_the_same_tokens(family: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    model = small(family).to(device, dtype)
    for config in (
        dataclasses.replace(GREEDY, max_new_tokens=80),
        GenerationConfig(max_new_tokens=80, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=7),
    ):
        graph = generate(model, PROMPTS, config, return_states=True)
        plain = generate(model, PROMPTS, dataclasses.replace(config, cuda_graph=False), return_states=True)
        assert graph.tokens == plain.tokens
        assert graph.states is not None
        assert plain.states is not None
        for a, b in zip(graph.states[0].tensors(), plain.states[0].tensors()):
            if a.ndim == 4:
                a, b = a[:, :, :80], b[:, :, :80]
            assert torch.equal(a, b)


def test_no_graph_stands_for_steps_that_differ(as_a_graph: list[int]) -> None:
    """What a step of a U-Net of pooled stages runs depends on how many came before."""
    model: Any = ssm_modal.create_model("sashimi_lm", d_model=8)
    generate(model, [[1, 2]], GREEDY)
    assert as_a_graph == []

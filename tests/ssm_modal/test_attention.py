"""Attention: the laws, softmax written out, the cache, grouped heads, rotary positions, packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import Attention, AttentionConfig
from ssm_modal.layers.attention import BLOCK
from tests.ssm_modal import layer_laws as laws
from tests.tolerances import OUTPUT, assert_close

CONFIGS = {
    "rotary": AttentionConfig(n_heads=4),
    "grouped": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, bias=True),
    "one kv head, no positions": AttentionConfig(n_heads=3, n_kv_heads=1, head_dim=5, rope_theta=None),
}


def naive_forward(layer: Attention, x: Tensor) -> Tensor:
    """Softmax attention written out for one head and one query at a time; rotary by complex
    multiplication."""
    config, hd = layer.config, layer.head_dim
    out = x.new_zeros(*x.shape[:2], layer.d_inner)

    def rotate(v: Tensor, position: int) -> Tensor:
        if config.rope_theta is None:
            return v
        half = hd // 2
        angles = torch.tensor([position * config.rope_theta ** (-i / half) for i in range(half)]).double()
        turned = torch.complex(v[:half], v[half:]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag])

    for b in range(x.shape[0]):
        for h in range(layer.n_heads):
            g = h * layer.n_kv_heads // layer.n_heads
            q = layer.q_proj(x[b])[:, h * hd : (h + 1) * hd]
            k = layer.k_proj(x[b])[:, g * hd : (g + 1) * hd]
            v = layer.v_proj(x[b])[:, g * hd : (g + 1) * hd]
            for t in range(x.shape[1]):
                last = t + 1 if config.causal else x.shape[1]
                scores = torch.stack([rotate(q[t], t) @ rotate(k[s], s) for s in range(last)]) / math.sqrt(hd)
                out[b, t, h * hd : (h + 1) * hd] = torch.softmax(scores, 0) @ v[:last]
    return layer.out_proj(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_laws(name: str, device: torch.device) -> None:
    layer = CONFIGS[name].build(24).to(device, torch.float64)
    laws.all_laws(layer, torch.float64)
    laws.reverse_equals_flip_layer_flip(layer, torch.float64)
    laws.packed_equals_separate(layer, torch.float64, reverse=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_softmax_written_out(name: str, causal: bool) -> None:
    from dataclasses import replace

    layer = replace(CONFIGS[name], causal=causal).build(24).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    with torch.no_grad():
        # the layer's rotary angles are fp32
        assert_close(layer(x)[0], naive_forward(layer, x), 1e-6)


def test_the_cache_grows_by_blocks_and_keeps_every_step() -> None:
    layer = AttentionConfig(n_heads=2).build(8).double()
    x = torch.randn(1, BLOCK + 5, 8, dtype=torch.float64)
    with torch.no_grad():
        want, _ = layer(x)
        state = layer.init_state(1)
        assert state.capacity == BLOCK
        steps = [layer.step_(x[:, t : t + 1], state) for t in range(x.shape[1])]
        assert state.capacity == 2 * BLOCK
        assert state.lengths.tolist() == [BLOCK + 5]
        assert_close(torch.cat(steps, 1), want, OUTPUT[torch.float64])
        _, state = layer(x[:, :3])
        _, state = layer(x[:, 3:4], state)
        assert state.capacity == BLOCK
        assert state.used == 4


def test_rows_of_unequal_length_share_a_cache() -> None:
    """Prompts packed, then decoded as a batch: each row goes on from its own length."""
    layer = AttentionConfig(n_heads=2).build(8).double()
    seqs = Sequences.from_lengths([2, 6, 3])
    x, more = torch.randn(1, 11, 8).double(), torch.randn(3, 4, 8).double()
    with torch.no_grad():
        _, state = layer(x, seqs=seqs)
        assert state.lengths.tolist() == [2, 6, 3]
        mine = state.clone()
        y, after = layer(more, state)
        steps = torch.cat([layer.step_(more[:, t : t + 1], mine) for t in range(4)], 1)
        assert_close(steps, y, OUTPUT[torch.float64])
        assert after.lengths.tolist() == [6, 10, 7]
        for row, (a, n) in enumerate(zip(seqs.starts, seqs.lengths)):
            whole, _ = layer(torch.cat([x[:, a : a + n], more[row : row + 1]], 1))
            assert_close(y[row : row + 1], whole[:, n:], OUTPUT[torch.float64], f"row {row}")
        two, _ = layer(more[[2, 0]], state.select([2, 0]))
        assert_close(two, y[[2, 0]], OUTPUT[torch.float64])


def test_rotary_sees_only_distances() -> None:
    layer = AttentionConfig(n_heads=1, head_dim=8).build(8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = lambda v, p: layer._rotate(v, torch.tensor([[p]]))  # noqa: E731
    near = (at(q, 7) * at(k, 3)).sum()
    far = (at(q, 1007) * at(k, 1003)).sum()
    assert_close(near, far, 1e-4)
    assert abs(float((at(q, 8) * at(k, 3)).sum() - near)) > 1e-3


def test_attention_to_the_whole_sequence_has_no_state() -> None:
    layer = AttentionConfig(n_heads=2, causal=False).build(8).double()
    seqs = Sequences.from_lengths([3, 0, 4, 1])
    x = torch.randn(1, 8, 8).double()
    y, state = layer(x, seqs=seqs)
    assert state is None
    for a, n in zip(seqs.starts, seqs.lengths):
        if n:
            assert_close(y[:, a : a + n], layer(x[:, a : a + n])[0], OUTPUT[torch.float64])
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    with pytest.raises(StateError, match="whole sequence"):
        layer.init_state(1)
    causal = AttentionConfig(n_heads=2).build(8).double()
    with pytest.raises(StateError, match="was given a state"):
        layer(x, causal.init_state(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads is 3, expected a divisor of n_heads 4"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number with rope_theta"),
        ({"n_heads": 0}, "n_heads is 0, expected more than 0"),
    ],
)
def test_a_wrong_config_is_named(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(**values)  # type: ignore[arg-type]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="n_heads is 5, expected a divisor of d_model 24"):
        AttentionConfig(n_heads=5).build(24)

"""Two directions: against explicit flips, for every way to combine and share, and every mixer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_modal.errors import StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import (
    AttentionConfig,
    Bidirectional,
    BidirectionalConfig,
    MambaConfig,
    MixerConfig,
    S4DConfig,
)
from ssm_modal.state import State
from tests.tolerances import OUTPUT, assert_close

MIXERS = {
    "mamba": MambaConfig(d_state=4),
    "s4d": S4DConfig(d_state=4),
    "s4d gate": S4DConfig(d_state=4, output="gate"),
    "attention": AttentionConfig(n_heads=2),
}
COMBINE = ("sum", "mean", "concat")
SHARE = ("none", "projections", "all")


def by_flips(layer: Bidirectional, x: Tensor) -> Tensor:
    """The same layer from forward runs alone: the input flipped, run forwards, and flipped back."""
    first, second = layer.forwards, layer.backwards
    share, combine = layer.config.share, layer.config.combine
    if share == "none":
        assert second is not None
        ahead, back = first(x)[0], second(x.flip(1))[0].flip(1)
    else:
        h = first.project_in(x)
        flipped = first.project_in(x.flip(1))
        ahead = first.mix(h)[0]
        back = (second or first).mix(flipped)[0].flip(1)
        if combine != "concat":
            both = ahead + back
            return first.project_out(both / 2 if combine == "mean" else both)
        ahead, back = first.project_out(ahead), first.project_out(back)
    if combine == "concat":
        assert layer.out_proj is not None
        return layer.out_proj(torch.cat([ahead, back], -1))
    return (ahead + back) / 2 if combine == "mean" else ahead + back


def build(mixer: MixerConfig, combine: str, share: str) -> Bidirectional:
    return Bidirectional(8, mixer, BidirectionalConfig(combine=combine, share=share)).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("share", SHARE)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("mixer", MIXERS)
def test_equals_explicit_flips(mixer: str, combine: str, share: str) -> None:
    layer = build(MIXERS[mixer], combine, share)
    x = torch.randn(2, 11, 8).double()
    y, state = layer(x)
    assert state is None
    assert_close(y, by_flips(layer, x), OUTPUT[torch.float64])
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("share", SHARE)
@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_equals_separate(mixer: str, share: str) -> None:
    layer = build(MIXERS[mixer], "sum", share)
    seqs = Sequences.from_lengths([4, 0, 1, 7])
    x = torch.randn(1, 12, 8).double()
    with torch.no_grad():
        y, _ = layer(x, seqs=seqs)
        for a, n in zip(seqs.starts, seqs.lengths):
            if n:
                assert_close(y[:, a : a + n], layer(x[:, a : a + n])[0], OUTPUT[torch.float64])


def test_the_mirror_law() -> None:
    """With everything shared, the layer of the flipped input is the flipped output of the layer."""
    layer = build(MIXERS["mamba"], "sum", "all")
    x = torch.randn(2, 9, 8).double()
    with torch.no_grad():
        assert_close(layer(x.flip(1))[0], layer(x)[0].flip(1), OUTPUT[torch.float64])


def test_sharing_shares_parameters() -> None:
    count = {s: sum(p.numel() for p in build(MIXERS["mamba"], "sum", s).parameters()) for s in SHARE}
    one = sum(p.numel() for p in MIXERS["mamba"].build(8).parameters())
    projections = 8 * 32 + 16 * 8  # in_proj and out_proj
    assert count == {"none": 2 * one, "projections": 2 * one - projections, "all": one}


def test_every_output_sees_the_whole_sequence() -> None:
    layer = build(MIXERS["mamba"], "mean", "none")
    x = torch.randn(1, 10, 8).double()
    changed = x.clone()
    changed[:, 4] += 1
    with torch.no_grad():
        moved = (layer(x)[0] - layer(changed)[0]).abs().amax(-1)
    assert (moved > 0).all()


def test_a_state_is_refused() -> None:
    layer = build(MIXERS["mamba"], "sum", "all")
    state: State = MIXERS["mamba"].build(8).init_state(1)
    with pytest.raises(StateError, match="Bidirectional: was given a state"):
        layer(torch.zeros(1, 3, 8).double(), state)
    with pytest.raises(StateError, match="has no state"):
        layer.init_state(1)
    with pytest.raises(StateError, match="cannot step"):
        layer.step_(torch.zeros(1, 1, 8).double(), state)

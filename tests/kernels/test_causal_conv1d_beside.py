"""`causal_conv1d_beside`: outputs and gradients are those of a split before `causal_conv1d`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels.conv import causal_conv1d, causal_conv1d_beside
from ssm_modal.kernels.sequences import Sequences
from tests.kernels.laws import Place, places, skip_unless_served

PLACES = places("causal_conv1d")
D_INNER, REST, LENGTH = 5, 7, 13

pytestmark = pytest.mark.usefixtures("poison")


def make(device: torch.device, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x (1 or 2 rows wide enough for both), weight, bias and an entering state."""
    torch.manual_seed(0)
    batch = 1 if rows > 2 else rows
    shapes = ((batch, LENGTH, D_INNER + REST), (D_INNER, 4), (D_INNER,), (rows, D_INNER, 3))
    return [torch.randn(*shape).to(device, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("used", ["all", "rest", "out", "final"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_equals_a_split_before(place: Place, packed: bool, used: str) -> None:
    """To the bit, with gradients from all three outputs and from each alone."""
    skip_unless_served("causal_conv1d", place)
    x, weight, bias, state = given = make(place.device, 3 if packed else 2)
    seqs = Sequences.from_lengths([4, 0, 9], place.device) if packed else None
    options = {"activation": "silu", "initial_state": state, "cu_seqlens": seqs, "reverse": packed}
    options["backend"] = place.backend
    out, final, rest = causal_conv1d_beside(x, weight, bias, **options)
    own, wanted_rest = x.split([D_INNER, REST], dim=-1)
    want, want_final = causal_conv1d(own, weight, bias, **options, return_final_state=True)
    sides = []
    for outs in ((out, final, rest), (want, want_final, wanted_rest)):
        torch.manual_seed(1)
        parts = [(o * torch.randn(o.shape).to(place.device)).sum() for o in outs]
        chosen = {"all": parts, "out": parts[:1], "final": parts[1:2], "rest": parts[2:]}[used]
        grads = torch.autograd.grad(sum(chosen), given, allow_unused=True)
        zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, given)]
        sides.append([*(o.detach() for o in outs), *zeros])
    for got, expected in zip(*sides):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("place", PLACES)
def test_without_gradients(place: Place) -> None:
    skip_unless_served("causal_conv1d", place)
    x, weight, bias, state = make(place.device, 2)
    options = {"initial_state": state, "backend": place.backend}
    with torch.no_grad():
        out, final, rest = causal_conv1d_beside(x, weight, bias, **options)
        want = causal_conv1d(x[..., :D_INNER], weight, bias, **options, return_final_state=True)
    assert torch.equal(out, want[0])
    assert torch.equal(final, want[1])
    assert torch.equal(rest, x[..., D_INNER:])


@pytest.mark.parametrize("place", PLACES)
def test_second_derivatives(place: Place) -> None:
    """Those of torch, or a refusal that says how to have them."""
    skip_unless_served("causal_conv1d", place)
    x, weight, bias, _ = make(place.device, 2)
    out, _, rest = causal_conv1d_beside(x, weight, bias, backend=place.backend)
    (dx,) = torch.autograd.grad((out**2).sum() + (rest**2).sum(), x, create_graph=True)
    if place.backend == "torch":
        (second,) = torch.autograd.grad((dx[..., D_INNER:] ** 2).sum(), x)
        assert torch.equal(second[..., D_INNER:], 8 * x.detach()[..., D_INNER:])
    else:
        with pytest.raises(RuntimeError, match="causal_conv1d has first derivatives only"):
            dx.sum().backward()


def test_bad_arguments_are_named() -> None:
    x, weight, bias, _ = make(torch.device("cpu"), 2)
    with pytest.raises(ValueError, match="x has 3 channels, expected at least d_inner 5 of weight"):
        causal_conv1d_beside(x[..., :3], weight, bias)
    with pytest.raises(ValueError, match="causal_conv1d_beside: x has shape"):
        causal_conv1d_beside(x[0], weight, bias)
    with pytest.raises(ValueError, match="causal_conv1d_beside: weight has shape"):
        causal_conv1d_beside(x, weight[0], bias)

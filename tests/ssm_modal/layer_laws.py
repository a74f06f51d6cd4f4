"""The laws every layer with a state keeps, written once: the tests of each mixer and of the backbone call
them.

A layer is called as `layer(x, state, seqs=..., **more)` and returns (y, state); x: (batch, length, d_model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ssm_modal.kernels.sequences import Sequences
from tests.tolerances import GRADIENT, OUTPUT, assert_close

LENGTHS = (5, 0, 1, 13, 2)


def inputs(layer: Any, batch: int, length: int) -> Tensor:
    """Normal inputs of the layer's width, dtype and device."""
    p = next(layer.parameters())
    return torch.randn(batch, length, layer.d_model, dtype=p.dtype, device=p.device)


def assert_states_close(a: Any, b: Any, tolerance: float, what: str) -> None:
    """Every tensor of two states within `tolerance`; attention's caches over their used slots alone."""
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(left) == len(right)
    for i, (x, y) in enumerate(zip(left, right)):
        if isinstance(x, Tensor):
            if x.ndim == 4:
                n = min(x.shape[2], y.shape[2])
                x, y = x[:, :, :n], y[:, :, :n]
            assert_close(x, y, tolerance, f"{what}, tensor {i} of the state")


def split_and_carry_equals_whole(
    layer: nn.Module, dtype: torch.dtype, cuts: tuple[int, ...] = (1, 2, 9, 10)
) -> None:
    """Segments with the state carried give the outputs, the last state and the gradients of one call."""
    x = inputs(layer, 2, 23).requires_grad_()
    weight = torch.randn_like(x)
    whole, last = layer(x)
    wanted = torch.autograd.grad((whole * weight).sum(), [x, *layer.parameters()], allow_unused=True)
    state, parts = None, []
    for a, b in zip((0, *cuts), (*cuts, x.shape[1])):
        part, state = layer(x[:, a:b], state)
        parts.append(part)
    y = torch.cat(parts, dim=1)
    assert_close(y, whole, OUTPUT[dtype], "outputs of segments")
    assert_states_close(state, last, OUTPUT[dtype], "segments")
    got = torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()], allow_unused=True)
    for name, g, w in zip(["x", *(n for n, _ in layer.named_parameters())], got, wanted):
        assert (g is None) == (w is None), name
        if g is not None and w is not None:
            assert_close(g, w, GRADIENT[dtype], f"gradient of {name} through segments")


def packed_equals_separate(layer: nn.Module, dtype: torch.dtype, **more: Any) -> None:
    """Sequences end to end, one of them empty, give what each gives alone; twice over, with the states
    carried."""
    device = next(layer.parameters()).device
    seqs = Sequences.from_lengths(LENGTHS, device)
    first, second = inputs(layer, 1, seqs.total), inputs(layer, 1, seqs.total)
    y1, state = layer(first, seqs=seqs, **more)
    y2, state = layer(second, state, seqs=seqs, **more)
    for row, (a, n) in enumerate(zip(seqs.starts, LENGTHS)):
        if n == 0:
            continue
        w1, own = layer(first[:, a : a + n], **more)
        w2, own = layer(second[:, a : a + n], own, **more)
        assert_close(y1[:, a : a + n], w1, OUTPUT[dtype], f"sequence {row}")
        assert_close(y2[:, a : a + n], w2, OUTPUT[dtype], f"sequence {row}, second segment")
        mine = state.select([row])
        if not any(t.ndim == 4 for t in mine.tensors()):
            assert_states_close(mine, own, OUTPUT[dtype], f"sequence {row}")


def step_equals_scan(layer: Any, dtype: torch.dtype, length: int = 12) -> None:
    """Single steps, by calls and in place, give the outputs and the state of one call."""
    x = inputs(layer, 3, length)
    with torch.no_grad():
        whole, last = layer(x)
        state: Any = layer.init_state(3)
        steps = []
        for t in range(length):
            y, state = layer(x[:, t : t + 1], state)
            steps.append(y)
        assert_close(torch.cat(steps, 1), whole, OUTPUT[dtype], "steps by calls")
        assert_states_close(state, last, OUTPUT[dtype], "steps by calls")
        state = layer.init_state(3)
        steps = [layer.step_(x[:, t : t + 1], state) for t in range(length)]
        assert_close(torch.cat(steps, 1), whole, OUTPUT[dtype], "steps in place")
        assert_states_close(state, last, OUTPUT[dtype], "steps in place")


def the_given_state_is_untouched(layer: Any) -> None:
    """Calls from one state leave it as it was, so two continuations from it do not meet."""
    x = inputs(layer, 2, 6)
    with torch.no_grad():
        _, state = layer(x)
        before = state.clone()
        a, _ = layer(x[:, :4], state)
        layer(x[:, :1] * 3, state)
        b, _ = layer(x[:, :4], state)
    assert torch.equal(a, b)
    for u, v in zip(pytree.tree_leaves(state), pytree.tree_leaves(before)):
        assert torch.equal(u, v) if isinstance(u, Tensor) else u == v


def the_future_leaves_the_past(layer: nn.Module, at: int = 7) -> None:
    """Changing x from step `at` on changes nothing before it, bit for bit, and something from it on."""
    x = inputs(layer, 2, 15)
    changed = x.clone()
    changed[:, at:] += 1
    with torch.no_grad():
        a, b = layer(x)[0], layer(changed)[0]
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at], b[:, at])


def reverse_equals_flip_layer_flip(layer: Any, dtype: torch.dtype) -> None:
    """Running backwards equals flipping, running forwards and flipping back; twice, with the state
    carried."""
    x = inputs(layer, 2, 14)
    first, second = x[:, 5:], x[:, :5]
    with torch.no_grad():
        y1, state = layer(first, reverse=True)
        y2, state = layer(second, state, reverse=True)
        w1, own = layer(first.flip(1))
        w2, own = layer(second.flip(1), own)
    assert_close(y1, w1.flip(1), OUTPUT[dtype], "reverse")
    assert_close(y2, w2.flip(1), OUTPUT[dtype], "reverse, second segment")
    assert_states_close(state, own, OUTPUT[dtype], "reverse")


def every_parameter_gets_a_gradient(layer: nn.Module) -> None:
    """The loss reaches every parameter, with finite gradients that are not all zero."""
    y, _ = layer(inputs(layer, 2, 18))  # a pooled stage has a few steps too
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def all_laws(layer: Any, dtype: torch.dtype) -> None:
    """Every law but the reverse one."""
    split_and_carry_equals_whole(layer, dtype)
    packed_equals_separate(layer, dtype)
    step_equals_scan(layer, dtype)
    the_given_state_is_untouched(layer)
    the_future_leaves_the_past(layer)
    every_parameter_gets_a_gradient(layer)

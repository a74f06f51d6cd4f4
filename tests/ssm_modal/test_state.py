"""States: copies, casts, rows, pytrees."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ssm_modal.backbone import BackboneState
from ssm_modal.layers import AttentionState, MambaState
from ssm_modal.state import State


@dataclass(frozen=True)
class Toy(State):
    wide: ClassVar[frozenset[str]] = frozenset({"kept"})
    kept: Tensor
    cast: Tensor
    count: Tensor
    used: int = 0


def toy(rows: int = 4) -> Toy:
    return Toy(torch.randn(rows, 3), torch.randn(rows, 2, 2), torch.arange(rows), 7)


def nested() -> BackboneState:
    attention = AttentionState(
        torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 3), torch.tensor([1, 2, 3, 4]), 5
    )
    return BackboneState((toy(), attention, MambaState(torch.randn(4, 6, 3), torch.randn(4, 6, 2))))


def test_a_state_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        toy().used = 3  # type: ignore[misc]


def test_clone_shares_nothing() -> None:
    state = nested()
    copy = state.clone()
    for a, b in zip(state.tensors(), copy.tensors()):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert len(state.tensors()) == 8
    copy[0].kept.zero_()  # type: ignore[attr-defined]
    assert state[0].kept.abs().sum() > 0  # type: ignore[attr-defined]


def test_detach_cuts_the_graph_and_clone_does_not() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    state = MambaState(x * 2, x * 3)
    assert not any(t.requires_grad for t in state.detach().tensors())
    state.clone().ssm.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))  # type: ignore[arg-type]


def test_casting_leaves_wide_and_integer_tensors() -> None:
    state = BackboneState((toy(),)).to(dtype=torch.bfloat16)
    inner = state[0]
    assert isinstance(inner, Toy)
    assert (inner.kept.dtype, inner.cast.dtype, inner.count.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.int64,
    )
    assert inner.used == 7
    assert MambaState(torch.zeros(1), torch.zeros(1)).to("meta").ssm.device.type == "meta"
    with pytest.raises(TypeError, match="give a dtype as"):
        toy().to(torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([2, 0, 2], [2, 0, 2]),
        (torch.tensor([3, -1]), [3, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (slice(1, 3), [1, 2]),
        (1, [1]),
        ([], []),
    ],
)
def test_select_takes_rows(rows: object, want: list[int]) -> None:
    state = nested()
    chosen = state.select(rows)  # type: ignore[arg-type]
    assert chosen.batch_size == len(want)
    for a, b in zip(state.tensors(), chosen.tensors()):
        assert torch.equal(a[want], b)
    assert chosen[1].used == 5  # type: ignore[attr-defined]


def test_a_selection_is_a_copy() -> None:
    state = toy()
    before = state.kept.clone()
    state.select(slice(None)).kept.zero_()
    assert torch.equal(state.kept, before)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 4], IndexError, "rows holds 4, the state has 4 rows"),
        ([-5], IndexError, "rows holds -5, the state has 4 rows"),
        (torch.tensor([True]), IndexError, r"mask of shape \(1,\), the state has 4 rows"),
        (torch.tensor([0.5]), TypeError, "rows has dtype torch.float32"),
    ],
)
def test_wrong_rows_are_named(rows: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nested().select(rows)  # type: ignore[arg-type]


def test_states_are_pytrees() -> None:
    state = nested()
    doubled = pytree.tree_map(lambda v: v * 2, state)
    assert isinstance(doubled, BackboneState)
    assert isinstance(doubled[1], AttentionState)
    assert doubled[1].used == 5  # host values are no leaves
    for a, b in zip(state.tensors(), doubled.tensors()):
        assert torch.equal(a * 2, b)
    leaves, spec = pytree.tree_flatten(state)
    again = pytree.tree_unflatten(leaves, spec)
    assert all(a is b for a, b in zip(again.tensors(), state.tensors()))
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    assert keys[0] == ".layers[0].kept"


def test_a_backbone_state_reads_as_a_tuple() -> None:
    state = nested()
    assert len(state) == 3
    assert list(state) == [state[0], state[1], state[2]]
    assert state.batch_size == 4

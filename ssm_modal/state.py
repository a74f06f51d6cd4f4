"""What a layer carries from one segment of a sequence to the next.

Every stateful layer has one frozen dataclass derived from `State`. Axis 0 of every tensor in it is the batch
row (with packed sequences: one row a sequence). Subclasses are registered as pytrees, so
`torch.utils._pytree.tree_map` reaches their tensors, and nest: a backbone's state holds its layers' states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class State:
    """Base of all states: a frozen dataclass of tensors, nested states, tuples of them, and host values.

    `wide` names the fields that keep their dtype when a state is cast (recurrent states stay fp32 or fp64).
    """

    wide: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda children, context: _unflatten(cls, children, context),
            flatten_with_keys_fn=_flatten_with_keys,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def _map(self, fn: Callable[[State, str, Tensor], Tensor]) -> Self:
        """A state of the same class with `fn(owner, field, tensor)` in place of every tensor."""
        changed = {
            f.name: self._map_value(f.name, getattr(self, f.name), fn) for f in dataclasses.fields(self)
        }
        return dataclasses.replace(self, **changed)

    def _map_value(self, name: str, value: Any, fn: Callable[[State, str, Tensor], Tensor]) -> Any:
        if isinstance(value, Tensor):
            return fn(self, name, value)
        if isinstance(value, State):
            return value._map(fn)
        if isinstance(value, tuple):
            return tuple(self._map_value(name, v, fn) for v in value)
        return value

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, nested ones included, in field order."""
        return [leaf for leaf in pytree.tree_leaves(self) if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """Number of rows (batch entries, or packed sequences)."""
        first = _first_tensor(self)
        return first.shape[0] if first is not None else 0

    def clone(self) -> Self:
        """A copy that shares no memory with this state; gradients flow through."""
        return self._map(lambda owner, name, tensor: tensor.clone())

    def detach(self) -> Self:
        """The same values cut from the autograd graph; shares memory with this state."""
        return self._map(lambda owner, name, tensor: tensor.detach())

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Self:
        """The state on `device`; `dtype` casts floating tensors except the fields named in `wide`."""
        if isinstance(device, torch.dtype):
            raise TypeError("State.to: the first argument is the device; give a dtype as State.to(dtype=...)")

        def move(owner: State, name: str, tensor: Tensor) -> Tensor:
            keep = dtype is None or name in owner.wide or not tensor.is_floating_point()
            return tensor.to(device=device, dtype=None if keep else dtype)

        return self._map(move)

    def reserve(self, steps: int) -> Self:
        """The state with room for `steps` more steps in place, so that no tensor is replaced while they run.

        States of constant size are as they were and share memory; one that grows may be a copy.
        """
        changed = {
            f.name: _each(getattr(self, f.name), lambda state: state.reserve(steps))
            for f in dataclasses.fields(self)
        }
        return dataclasses.replace(self, **changed)

    def advance_(self, steps: int) -> None:
        """Note on the host that the device has taken `steps` steps in place, as a CUDA graph does unseen."""
        for f in dataclasses.fields(self):
            _each(getattr(self, f.name), lambda state: state.advance_(steps))

    def select(self, rows: Tensor | Sequence[int] | slice | int) -> Self:
        """The given batch rows, in the given order; a row may be taken more than once.

        rows: indices (int64 tensor, sequence of ints or one int), a boolean mask of all rows, or a slice.
        Always a copy, so that neither state sees the other's in-place steps. Raises IndexError for a row that
        is not there.
        """
        n = self.batch_size
        if isinstance(rows, slice):
            rows = list(range(*rows.indices(n)))
        if isinstance(rows, int):
            rows = [rows]
        if not isinstance(rows, Tensor):
            index = torch.tensor(list(rows), dtype=torch.int64)
        elif rows.dtype == torch.bool:
            if rows.shape != (n,):
                raise IndexError(f"rows is a mask of shape {tuple(rows.shape)}, the state has {n} rows")
            index = rows.nonzero().squeeze(1)
        else:
            if rows.is_floating_point() or rows.is_complex():
                raise TypeError(f"rows has dtype {rows.dtype}, expected integers or a boolean mask")
            index = rows.to(torch.int64).reshape(-1)
        if index.device.type == "cpu" and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < -n or high >= n:
                raise IndexError(f"rows holds {high if high >= n else low}, the state has {n} rows")
        index = torch.where(index < 0, index + n, index)
        return self._map(lambda owner, name, tensor: tensor.index_select(0, index.to(tensor.device)))


def _each(value: Any, fn: Callable[[State], Any]) -> Any:
    """`value` with fn(state) in place of each state that it is or holds."""
    if isinstance(value, State):
        return fn(value)
    return tuple(_each(v, fn) for v in value) if isinstance(value, tuple) else value


def _first_tensor(value: Any) -> Tensor | None:
    """The first of `State.tensors`, without a walk through all of them: every layer asks at every call."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, State):
        inside: Any = [getattr(value, f.name) for f in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        inside = value
    else:
        return None
    # A plain loop: torch.compile does not read a generator that assigns.
    for one in inside:
        found = _first_tensor(one)
        if found is not None:
            return found
    return None


def _split(state: State) -> tuple[list[str], list[tuple[str, Any]]]:
    """Names of the fields pytrees descend into, and the plain host values beside them."""
    children, plain = [], []
    for f in dataclasses.fields(state):
        value = getattr(state, f.name)
        if isinstance(value, (bool, int, float, str)):
            plain.append((f.name, value))
        else:
            children.append(f.name)
    return children, plain


def _flatten(state: State) -> tuple[list[Any], Any]:
    children, plain = _split(state)
    return [getattr(state, name) for name in children], (tuple(children), tuple(plain))


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten(state)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(context[0], children)], context


def _unflatten(cls: type[State], children: Any, context: Any) -> State:
    names, plain = context
    return cls(**dict(zip(names, children)), **dict(plain))

"""What a computation done a second time needs to repeat the first: random numbers, autocast, context
variables.

A backward runs in a thread of its own on CUDA, without the autocast and the context variables of the forward.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class RandomState:
    """The random generators of the CPU and, for work on CUDA, of that device."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """The states as they are now; reads host memory alone."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        """Set the generators back to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


@contextmanager
def hooks_held(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, hooks registered on `tensors` do not run.

    A hook on a parameter is to see its gradient once, whole; `torch.autograd.grad` over a part would show it
    the part's.
    """
    held = [(hooks, dict(hooks)) for t in tensors if (hooks := getattr(t, "_backward_hooks", None))]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in held:
            hooks.update(own)


def refuse_second_derivatives(what: str) -> None:
    """Raise RuntimeError in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} has first derivatives only, but a graph of its gradients was asked for with "
            "create_graph=True"
        )


class Surroundings:
    """Autocast and context variables as they are where this object is made, for work on `device`.

    `run` calls a function under them from any thread. There autocast keeps no cast weights, but inside
    `casts_kept`: what it keeps from a pass without gradients must not serve one with them.
    """

    def __init__(self, device: torch.device) -> None:
        types = dict.fromkeys((device.type, "cpu"))
        self._autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
        self._variables = contextvars.copy_context()
        self._keep_casts = False
        self.device = device

    @contextmanager
    def casts_kept(self) -> Iterator[None]:
        """Inside, `run` casts each weight once and not in every call; all of these record gradients, or none
        does, and no weight changes."""
        torch.clear_autocast_cache()
        self._keep_casts = True
        try:
            # Autocast's cache lives as long as the outermost autocast: this one, which changes nothing else.
            kind = self.device.type
            with torch.autocast(
                kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
            ):
                yield
        finally:
            self._keep_casts = False
            torch.clear_autocast_cache()

    @property
    def narrow(self) -> bool:
        """Whether autocast computes in fp16 here, whose gradients need the loss scaled."""
        _, enabled, dtype = self._autocast[0]
        return enabled and dtype == torch.float16

    def run(self, function: Callable[..., T], *arguments: Any, grad: bool) -> T:
        """`function(*arguments)` under the surroundings kept, recording gradients or not."""

        def inside() -> T:
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(grad))
                for kind, enabled, dtype in self._autocast:
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._keep_casts)
                    )
                return function(*arguments)

        return self._variables.copy().run(inside)

"""What the custom ops of scan, convolution and norm share: the way past them, and their registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ssm_modal.kernels.checks import PLAIN, recording

NAMESPACE = "ssm_modal"

_PLAIN = frozenset((*PLAIN, type(None)))


def eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on `tensors` runs now, on plain tensors, and no mode or transform wants to see it.

    Then it may go past torch's dispatcher, which costs more than a short scan or convolution takes: straight
    to its backend where no gradient is recorded, else through a plain `torch.autograd.Function`, a fraction
    of what a custom op's autograd costs. Where a call is traced, compiled, exported or transformed, the
    custom op serves, which those know how to handle.
    """
    if (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return _PLAIN.issuperset(map(type, tensors))


def goes_straight(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on `tensors` may go straight to its backend: it runs eagerly and records no gradient."""
    return eager(tensors) and not recording(tensors)


def written(op: str, name: str, tensor: Tensor) -> None:
    """What torch does for a tensor that is about to be written in place, for a call that goes straight.

    Raises RuntimeError where several elements lie in one place (an expanded tensor), and lets autograd know,
    so that a backward that needs the old values says that they are gone.
    """
    for size, stride in zip(tensor.shape, tensor.stride()):
        if stride == 0 and size > 1:
            raise RuntimeError(
                f"{op}: {name} is expanded, strides {tensor.stride()}: several elements lie in one place, so "
                "it cannot be written; clone it first"
            )
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def without_none(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A custom op returns tensors only, none twice: a new empty one stands for each None."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def register(
    op: str,
    *,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
    no_second: str,
) -> None:
    """Tie `<op>_fwd` and `<op>_bwd`, whose schemas are defined, to their functions and to autograd.

    forward, backward: the ops; forward_fake, backward_fake: shapes and dtypes alone, for torch.compile.
    setup_context, gradients: `<op>_fwd` for autograd. no_second: the message of the RuntimeError where a
    second derivative is asked for.
    """

    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(no_second)

    fwd, bwd = f"{NAMESPACE}::{op}_fwd", f"{NAMESPACE}::{op}_bwd"
    torch.library.impl(fwd, "default")(forward)
    torch.library.impl(bwd, "default")(backward)
    torch.library.register_fake(fwd)(forward_fake)
    torch.library.register_fake(bwd)(backward_fake)
    torch.library.register_autograd(fwd, gradients, setup_context=setup_context)
    torch.library.register_autograd(bwd, refuse)

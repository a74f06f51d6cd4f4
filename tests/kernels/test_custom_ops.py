"""Which calls go past the custom ops, and that they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssm_modal.kernels import causal_conv1d, rms_norm, selective_scan
from ssm_modal.kernels.custom_ops import eager, goes_straight


class Ops(TorchDispatchMode):
    """Notes the custom ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ssm_modal":
            self.seen.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


Case = tuple[Callable[..., Any], list[Tensor], str]


def scan_case(backend: str) -> Case:
    given = [
        torch.randn(2, 7, 4), torch.randn(2, 7, 4), -torch.rand(4, 3), torch.randn(2, 7, 3),
        torch.randn(2, 7, 3), torch.randn(4), torch.randn(2, 7, 4), torch.randn(4), torch.randn(2, 4, 3),
    ]  # fmt: skip

    def call(u, delta, A, B, C, D, z, bias, state):  # type: ignore[no-untyped-def]
        return selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, initial_state=state,
            return_final_state=True, backend=backend,
        )  # fmt: skip

    return call, given, "selective_scan"


def conv_case(backend: str) -> Case:
    given = [torch.randn(2, 7, 4), torch.randn(4, 3), torch.randn(4), torch.randn(2, 4, 2)]

    def call(x, weight, bias, state):  # type: ignore[no-untyped-def]
        return causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, return_final_state=True, backend=backend
        )

    return call, given, "causal_conv1d"


def norm_case(backend: str) -> Case:
    given = [torch.randn(2, 7, 8), torch.randn(8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)]

    def call(x, weight, residual, gate):  # type: ignore[no-untyped-def]
        return rms_norm(x, weight, residual=residual, gate=gate, backend=backend)

    return call, given, "rms_norm"


CASES = [
    (scan_case, "torch"), (scan_case, "cpu"), (scan_case, "triton"), (conv_case, "cpu"),
    (conv_case, "triton"), (norm_case, "triton"),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0].__name__.removesuffix('_case')}-{c[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    make, backend = request.param
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            call, given, name = make(backend)
            return call, [t.cuda() for t in given], name
    return make(backend)


def gradients(case: Case, upstream: list[Tensor], *, backward_mode: Any = None) -> list[Tensor]:
    call, given, _ = case
    leaves = [t.clone().requires_grad_() for t in given]
    outputs = call(*leaves)
    if backward_mode is None:
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    with backward_mode:
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def test_past_the_op_and_through_it_are_the_same(case: Case) -> None:
    call, given, name = case
    upstream = [torch.randn_like(t) for t in call(*given)]
    leaves = [t.clone().requires_grad_() for t in given]
    assert type(call(*leaves)[0].grad_fn).__name__ in (
        "_ScanBackward",
        "_ConvolutionBackward",
        "_NormBackward",
    )
    past = gradients(case, upstream)
    ops = Ops()
    with ops:
        through = gradients(case, upstream)
    assert ops.seen == [f"{name}_fwd", f"{name}_bwd"]
    for a, b in zip(past, through, strict=True):
        assert torch.equal(a, b)
    ops = Ops()
    mixed = gradients(case, upstream, backward_mode=ops)
    # What wants to see the backward alone sees its op.
    assert ops.seen == [f"{name}_bwd"]
    for a, b in zip(past, mixed, strict=True):
        assert torch.equal(a, b)


def test_outputs_that_are_not_used(case: Case) -> None:
    """A gradient from either output alone is that of both with zeros for the other."""
    call, given, _ = case
    upstream = [torch.randn_like(t) for t in call(*given)]
    for used in range(2):
        leaves = [t.clone().requires_grad_() for t in given]
        alone = torch.autograd.grad(call(*leaves)[used], leaves, upstream[used], allow_unused=True)
        zeros = [g if i == used else torch.zeros_like(g) for i, g in enumerate(upstream)]
        both = gradients(case, zeros)[2:]
        for a, b in zip(alone, both, strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def test_gradient_checkpointing(case: Case) -> None:
    """It lets a backward ask for what was saved once."""
    call, given, _ = case
    upstream = [torch.randn_like(t) for t in call(*given)]
    leaves = [t.clone().requires_grad_() for t in given]
    outputs = checkpoint(call, *leaves, use_reentrant=False)
    got = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    for a, b in zip(got, gradients(case, upstream), strict=True):
        assert torch.equal(a, b)


def test_the_outputs_may_be_written(case: Case) -> None:
    """As those of any op: not views that autograd would refuse to have written."""
    call, given, _ = case
    outputs = call(*(t.clone().requires_grad_() for t in given))
    for t in outputs:
        t.mul_(2.0)
    assert torch.equal(outputs[0], 2.0 * call(*given)[0])


def test_transforms_are_refused(case: Case) -> None:
    """torch.func gets no wrong gradients: its tensors are plain by their type alone, but go to the op."""
    call, given, _ = case
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda first: sum(t.sum() for t in call(first, *given[1:])))(given[0])

    def plain(x: Tensor) -> Tensor:
        assert type(x) is Tensor
        assert not goes_straight((x,))
        return x

    torch.func.vmap(plain)(given[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_is_eager() -> None:
    x = torch.ones(2)
    parameter = torch.nn.Parameter(x.clone())
    assert eager((x, None, parameter))
    assert goes_straight((x, None))
    assert not goes_straight((x, parameter))
    with torch.no_grad():
        assert goes_straight((x, parameter))

    class Own(Tensor):
        pass

    assert not eager((x, x.as_subclass(Own)))
    with Ops():
        assert not eager((x,))
    seen = []
    torch.jit.trace(lambda t: (seen.append(eager((t,))), t + 1)[1], (x,), check_trace=False)
    assert seen == [False]

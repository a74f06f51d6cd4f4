"""What the tests of every op share: where it can run, values and gradients beside an fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels.dispatch import SUPPORT, why_not
from tests.tolerances import GRADIENT, OUTPUT, assert_close


@dataclass(frozen=True)
class Place:
    """A device and the backend asked for on it."""

    device: torch.device
    backend: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, where a call takes seconds: keep shapes tiny."""
        return self.backend == "triton" and self.device.type == "cpu"


def places(op: str) -> list[Any]:
    """Parameters: every device and backend that can serve `op`; those on CUDA are marked `gpu`."""
    params = []
    for backend in SUPPORT[op]:
        params.append(pytest.param(Place(torch.device("cpu"), backend), id=f"cpu-{backend}"))
        if backend != "cpu":
            place = Place(torch.device("cuda", 0), backend)
            params.append(pytest.param(place, id=f"cuda-{backend}", marks=pytest.mark.gpu))
    return params


def served(op: str) -> list[tuple[str, torch.dtype]]:
    """Every backend of `op` with every dtype that it takes on some device."""
    half = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = {"torch": (torch.float64, *half), "cpu": (torch.float32,), "triton": half}
    return [(backend, dtype) for backend in SUPPORT[op] for dtype in dtypes[backend]]


def skip_unless_possible(
    op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Skip, with the reason, where the backend cannot run here."""
    reason = why_not(op, backend, device, dtype)
    if reason is not None:
        pytest.skip(reason)


def skip_unless_served(op: str, place: Place, dtype: torch.dtype = torch.float32) -> None:
    """As `skip_unless_possible`, for a place."""
    skip_unless_possible(op, place.backend, place.device, dtype)


Arguments = Mapping[str, Tensor]


def leaves(arguments: Arguments) -> dict[str, Tensor]:
    """Copies with the same strides that require gradients."""
    return {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}


def widened(arguments: Arguments) -> dict[str, Tensor]:
    """The same numbers in fp64 (complex128), on the CPU, requiring gradients."""
    wide = {
        name: t.detach().to("cpu", torch.complex128 if t.is_complex() else torch.float64)
        for name, t in arguments.items()
    }
    return {name: t.requires_grad_() for name, t in wide.items()}


def values_and_gradients(
    function: Callable[..., Any], arguments: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and the gradient of a fixed random functional of all of them to every argument."""
    outputs = function(**arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss: Tensor | float = 0.0
    for out in outputs:
        wide = torch.complex128 if out.is_complex() else torch.float64
        weight = torch.randn(out.shape, generator=generator, dtype=wide)
        # The same rounding of the incoming gradient for every dtype: bf16 holds few digits.
        weight = weight.to(torch.bfloat16).to(wide) if not out.is_complex() else weight.to(torch.complex64)
        product = out * weight.to(out.device, out.dtype).conj()
        loss = loss + (product.real if out.is_complex() else product).to(torch.float64).sum()
    assert isinstance(loss, Tensor)
    names = list(arguments)
    found = torch.autograd.grad(loss, [arguments[n] for n in names], allow_unused=True)
    gradients = {n: torch.zeros_like(arguments[n]) if g is None else g for n, g in zip(names, found)}
    return outputs, gradients


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Arguments,
    options: Mapping[str, Any],
    reference_options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Assert that outputs and every gradient agree with `reference` in fp64."""
    own = leaves(arguments)
    outputs, gradients = values_and_gradients(function, own, options)
    expected, expected_gradients = values_and_gradients(reference, widened(arguments), reference_options)
    assert len(outputs) == len(expected)
    for i, (out, ref) in enumerate(zip(outputs, expected)):
        assert_close(out, ref, OUTPUT[dtype], f"output {i}")
    for name, gradient in gradients.items():
        assert gradient.dtype == own[name].dtype
        assert_close(gradient, expected_gradients[name], GRADIENT[dtype], f"gradient of {name}")

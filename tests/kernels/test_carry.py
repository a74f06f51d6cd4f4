"""`carry_states`: first and second derivatives by finite differences; nothing crosses a fresh start."""

from __future__ import annotations

import math

import pytest
import torch

from ssm_modal.kernels.scan.carry import carry_states


@pytest.mark.parametrize("starts", [(), (0,), (2, 3), (0, 19)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("n", [1, 5, 20])
def test_derivatives(n: int, dtype: torch.dtype, starts: tuple[int, ...]) -> None:
    """In one loop and in chunks of chunks."""
    torch.manual_seed(0)
    fresh = None
    if starts:
        fresh = torch.zeros(n, dtype=torch.bool)
        fresh[[k for k in starts if k < n]] = True
    decay = (torch.randn(1, n, 2, dtype=dtype) / 2).requires_grad_()
    last = torch.randn(1, n, 2, dtype=dtype, requires_grad=True)

    def carried(decay: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return carry_states(decay, last, fresh)

    assert torch.autograd.gradcheck(carried, (decay, last))
    assert torch.autograd.gradgradcheck(carried, (decay, last))


def test_nothing_crosses_a_fresh_start() -> None:
    """Not even NaN, in neither direction; a decay at a start counts for nothing."""
    n, start = 20, 7
    fresh = torch.zeros(n, dtype=torch.bool)
    fresh[start] = True
    decay, last = torch.full((1, n, 1), 0.5), torch.ones(1, n, 1)
    decay[:, start], last[:, 2] = math.nan, math.nan
    decay.requires_grad_()
    last.requires_grad_()
    states = carry_states(decay, last, fresh)
    values = states.detach()[0]
    assert values[2:start].isnan().all()
    assert float(values[start]) == 1
    assert float(values[start + 1]) == 1.5
    ddecay, dlast = torch.autograd.grad(states[:, start:].sum(), (decay, last))
    assert torch.equal(dlast[0, :start], torch.zeros(start, 1))
    assert float(dlast[0, start]) == pytest.approx(2, abs=1e-3)
    assert float(ddecay[0, start]) == 0
    assert float(ddecay[0, start + 1]) == pytest.approx(2, abs=1e-3)

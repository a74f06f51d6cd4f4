"""A row of the selective scan's matrix against the matrix itself, a column at a time by the plain loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.dispatch import why_not
from ssm_modal.kernels.scan import RowCarry, selective_scan_ref, selective_scan_row

LENGTH, D_INNER, D_STATE = 9, 6, 3


def system(groups: int, batch: int = 2) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    tail = (D_STATE,) if groups == 0 else (groups, D_STATE)
    return {
        "delta": normal(batch, LENGTH, D_INNER),
        "A": -normal(D_INNER, D_STATE).exp(),
        "B": normal(batch, LENGTH, *tail),
        "C": normal(batch, LENGTH, *tail),
        "delta_bias": normal(D_INNER),
    }


def matrix(x: dict[str, Tensor], reverse: bool) -> Tensor:
    """(batch, t, s, d_inner): column s is what the scan makes of a one at s in every channel."""
    columns = []
    for s in range(LENGTH):
        u = torch.zeros_like(x["delta"])
        u[:, s] = 1.0
        columns.append(
            selective_scan_ref(
                u,
                x["delta"],
                x["A"],
                x["B"],
                x["C"],
                delta_bias=x["delta_bias"],
                delta_softplus=True,
                reverse=reverse,
            )
        )
    return torch.stack(columns, dim=2)


def row(
    x: dict[str, Tensor], t: int, reverse: bool, borders: list[int], backend: str | None = None
) -> Tensor:
    """alpha_{t,s} for all s, chunk by chunk; borders: steps where chunks end, counted outward from t."""
    out = torch.zeros_like(x["delta"])
    carry = RowCarry.at(x["C"][:, t], D_INNER)
    seen = LENGTH - t if reverse else t + 1
    for near, far in pairwise([0, *(b for b in borders if 0 < b < seen), seen]):
        start, end = (t + near, t + far) if reverse else (t + 1 - far, t + 1 - near)
        part, carry = selective_scan_row(
            x["delta"][:, start:end],
            x["A"],
            x["B"][:, start:end],
            carry,
            delta_bias=x["delta_bias"],
            delta_softplus=True,
            reverse=reverse,
            backend=backend,
        )
        out[:, start:end] = part
    return out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 2, 3])
def test_rows_are_the_matrix_rows_in_any_chunks(groups: int, reverse: bool) -> None:
    x = system(groups)
    whole = matrix(x, reverse)
    for t in (0, 1, 5, LENGTH - 1):
        for borders in ([], [1], [2, 3, 7], list(range(1, LENGTH))):
            torch.testing.assert_close(row(x, t, reverse, borders), whole[:, t], rtol=1e-10, atol=1e-12)


def test_a_row_times_the_input_is_the_output() -> None:
    x = system(2)
    u = torch.randn(x["delta"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    given = (u, F.softplus(x["delta"] + x["delta_bias"]), x["A"], x["B"], x["C"])
    for reverse in (False, True):
        y = selective_scan_ref(*given, reverse=reverse)
        assert isinstance(y, Tensor)
        for t in (0, 4, LENGTH - 1):
            torch.testing.assert_close((row(x, t, reverse, [3]) * u).sum(1), y[:, t])


def test_half_precision_is_widened() -> None:
    x = {name: t if name in ("A", "delta_bias") else t.bfloat16() for name, t in system(1).items()}
    x = {name: t.float() if name in ("A", "delta_bias") else t for name, t in x.items()}
    carry = RowCarry.at(x["C"][:, -1], D_INNER)
    found, _ = selective_scan_row(
        x["delta"], x["A"], x["B"], carry, delta_bias=x["delta_bias"], delta_softplus=True
    )
    assert found.dtype == torch.float32
    right = matrix({name: t.double() for name, t in x.items()}, False)[:, -1]
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_every_backend_gives_the_row(backend: str) -> None:
    reason = why_not("selective_scan", backend, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    x = {name: t.float() for name, t in system(2, batch=1).items()}
    right = matrix({name: t.double() for name, t in x.items()}, False)[:, LENGTH - 1]
    found = row(x, LENGTH - 1, False, [4], backend=backend)
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="4 groups, expected a divisor of d_inner 6"):
        RowCarry.at(torch.zeros(1, 4, D_STATE), D_INNER)

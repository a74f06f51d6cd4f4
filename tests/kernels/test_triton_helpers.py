"""What several Triton kernels share: functions of one number, and sums over programs."""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch

from tests.kernels.laws import skip_unless_possible

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ssm_modal.kernels.triton_math import sigmoid, silu, softplus  # noqa: E402
from ssm_modal.kernels.triton_sums import column_sums  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")


@triton.jit
def _apply(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, sigmoid(v), mask=i < n)
    tl.store(out + n + i, silu(v), mask=i < n)
    tl.store(out + 2 * n + i, softplus(v), mask=i < n)


def test_functions_over_the_whole_range(device: torch.device) -> None:
    """Relative errors from -80, where e^x is near the smallest normal number, to 80."""
    skip_unless_possible("rms_norm", "triton", device)
    x = torch.cat([torch.linspace(-80, 80, 1001), torch.tensor([0.0, 1e-6, -1e-6, 200.0])]).to(device)
    found = torch.empty(3, len(x), device=device)
    _apply[(1,)](x, found, len(x), BLOCK=1024)
    wide = x.double()
    wanted = torch.stack([torch.sigmoid(wide), wide * torch.sigmoid(wide), torch.logaddexp(wide, wide * 0)])
    error = ((found - wanted) / wanted.abs().clamp_min(1e-300)).abs().nan_to_num(float("inf"))
    error[wanted == 0] = found[wanted == 0].abs().double()
    # e^x itself loses |x| half units in the last place when x is scaled by log2(e).
    allowed = 2e-6 + 1.5e-7 * wide.abs()
    assert (error <= allowed).all(), (error - allowed).amax(1)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 512, 513, 1300])
@pytest.mark.parametrize(
    ("planes", "width", "last"), [(1, 1, False), (3, 37, True), (5, 16, True), (3, 20, False)]
)
def test_column_sums(device: torch.device, rows: int, planes: int, width: int, last: bool) -> None:
    """Every row counts once, planes land where they belong, in the dtype of the result."""
    skip_unless_possible("rms_norm", "triton", device)
    partial = torch.randint(-8, 9, (rows, planes, width), device=device).float()
    main = torch.empty(width, planes - last, device=device)
    end = torch.empty(width, dtype=torch.float16, device=device) if last else None
    column_sums(partial, main, end)
    sums = partial.sum(0)
    assert torch.equal(main, sums[: planes - last].t())
    if end is not None:
        assert torch.equal(end, sums[-1].half())


@pytest.mark.parametrize(
    ("chunks", "d_state", "d_inner", "given"),
    [
        (1, 1, 1, (True, True)),
        (5, 3, 33, (True, False)),
        (130, 2, 4, (False, True)),
        (7, 4, 5, (False, False)),
    ],
)
def test_parameter_sums(
    device: torch.device, chunks: int, d_state: int, d_inner: int, given: tuple[bool, bool]
) -> None:
    from ssm_modal.kernels.scan.triton_totals import parameter_sums

    grads = torch.randn(chunks, d_state, d_inner, device=device)
    rows = [torch.randn(chunks, d_inner, device=device) if there else None for there in given]
    dA, *others = parameter_sums(grads, *rows)
    assert dA.is_contiguous()
    torch.testing.assert_close(dA, grads.double().sum(0).t().float(), rtol=1e-5, atol=1e-5)
    for found, row in zip(others, rows):
        assert (found is None) == (row is None)
        if found is not None and row is not None:
            torch.testing.assert_close(found, row.double().sum(0).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("d_state", "block", "partials"),
    [(1, 32, 1), (3, 32, 2), (16, 32, 1), (32, 16, 1), (20, 16, 3), (64, 8, 1)],
)
def test_matrix_gradients(device: torch.device, d_state: int, block: int, partials: int) -> None:
    """A lane holds every q-th state, q = 32 / block, and they stand together in memory."""
    from ssm_modal.kernels.scan.triton_totals import matrix_gradients

    padded = 1 << (d_state - 1).bit_length()
    share = max(1, min(32 // block, padded))
    sums = torch.randn(partials, 2, 9, 2, 2, max(4, padded), device=device)
    dB, dC = matrix_gradients(sums, d_state, block, torch.bfloat16)
    places = [n % share * (padded // share) + n // share for n in range(d_state)]
    expected = sums.sum(0)[..., places].bfloat16()
    torch.testing.assert_close(dB, expected[..., 0, :])
    torch.testing.assert_close(dC, expected[..., 1, :])

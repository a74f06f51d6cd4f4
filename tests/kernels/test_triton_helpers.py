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

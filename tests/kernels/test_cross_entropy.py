"""`cross_entropy`: loss and gradient against torch's in fp64 on every backend that serves; bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.loss import cross_entropy, cross_entropy_ref
from tests.kernels.laws import Place, places, skip_unless_served
from tests.tolerances import GRADIENT, OUTPUT, assert_close

PLACES = places("cross_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poison")


def make(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits with a spread of 3 in rows of a wider tensor, and targets that hold the first and last class."""
    wide = (3 * torch.randn(rows, vocab + 5, dtype=torch.float64)).to(device, dtype)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[:2] = torch.tensor([0, vocab - 1], device=device)
    return wide[:, 2 : vocab + 2], targets


def formula(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own loss and gradient in fp64."""
    wide = logits.detach().double().cpu().requires_grad_()
    loss = F.cross_entropy(wide, targets.cpu(), reduction="sum")
    return loss.detach(), torch.autograd.grad(loss * scale, wide)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_loss_and_gradient_are_torchs(place: Place, dtype: torch.dtype) -> None:
    """Rows narrower than a block of the kernel, of one block and of several; in strided rows."""
    skip_unless_served("cross_entropy", place, dtype)
    torch.manual_seed(0)
    # The interpreter cuts fp32 to half precision where hardware rounds.
    slack = 2 if place.interpreted and dtype != torch.float32 else 1
    for rows, vocab in ((5, 2), (3, 37), (4, 4096), (3, 9001)):
        logits, targets = make(rows, vocab, dtype, place.device)
        before = logits.clone()
        for scale in (None, 0.37):
            given = None if scale is None else torch.tensor(scale, device=place.device, dtype=torch.float64)
            loss, grad = cross_entropy(logits, targets, scale=given, gradient=True, backend=place.backend)
            want, want_grad = formula(logits, targets, scale or 1.0)
            assert loss.dtype == torch.float32
            assert_close(loss, want, OUTPUT[torch.float32], f"loss of {rows} x {vocab}")
            assert grad is not None
            assert grad.dtype == dtype
            assert_close(grad, want_grad, slack * GRADIENT[dtype] / 2, f"gradient of {rows} x {vocab}")
        alone, none = cross_entropy(logits, targets, backend=place.backend)
        assert none is None
        assert_close(alone, want, OUTPUT[torch.float32])
        assert torch.equal(logits, before)


@pytest.mark.parametrize("place", PLACES)
def test_classes_that_cannot_be_and_a_sure_one(place: Place) -> None:
    """-inf takes no part, even in a whole block; where p is 1 to rounding, p - 1 keeps its digits."""
    skip_unless_served("cross_entropy", place)
    logits = torch.full((2, 9000), -math.inf, device=place.device)
    logits[0, 8500:8502] = torch.tensor([1.0, 2.0])
    logits[1, 3], logits[1, 8600] = 30.0, 14.0
    targets = torch.tensor([8501, 3], device=place.device)
    loss, grad = cross_entropy(logits, targets, gradient=True, backend=place.backend)
    other = math.exp(-16.0)
    assert_close(loss, torch.tensor(math.log1p(math.exp(-1.0)) + math.log1p(other)), 1e-6)
    assert grad is not None
    assert float(grad[0, 8500]) == pytest.approx(1 / (1 + math.e), rel=1e-6)
    assert float(grad[0, 8501]) == pytest.approx(-1 / (1 + math.e), rel=1e-6)
    assert float(grad[1, 3]) == pytest.approx(-other, rel=0.3)  # log p is known to its last digit alone
    assert float(grad[1, 8600]) == pytest.approx(other, rel=1e-5)
    assert float(grad.abs().sum()) == pytest.approx(2 / (1 + math.e), rel=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_no_rows(place: Place) -> None:
    skip_unless_served("cross_entropy", place)
    logits = torch.zeros(0, 7, device=place.device)
    targets = torch.zeros(0, dtype=torch.int64, device=place.device)
    loss, grad = cross_entropy(logits, targets, gradient=True, backend=place.backend)
    assert float(loss) == 0
    assert grad is not None
    assert grad.shape == (0, 7)


def test_fp64_stays_fp64_and_the_reference_agrees() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(6, 11, dtype=torch.float64), torch.randint(11, (6,))
    scale = torch.tensor(3.0, dtype=torch.float64)
    want, want_grad = formula(logits, targets, 3.0)
    for function in (cross_entropy, cross_entropy_ref):
        loss, grad = function(logits, targets, scale=scale, gradient=True)
        assert loss.dtype == torch.float64
        assert grad is not None
        assert_close(loss, want, 1e-14)
        assert_close(grad, want_grad, 1e-14)


def test_bad_arguments_are_named() -> None:
    logits, targets = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits has shape \(3, 5, 1\), expected \(rows, vocab\)"):
        cross_entropy(logits[..., None], targets)
    with pytest.raises(TypeError, match="logits has dtype int64"):
        cross_entropy(logits.long(), targets)
    with pytest.raises(TypeError, match="targets has dtype int32"):
        cross_entropy(logits, targets.int())
    with pytest.raises(ValueError, match=r"targets has shape \(2,\), expected \(3,\), the rows of logits"):
        cross_entropy(logits, targets[:2])
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=f"targets holds {wrong}, expected 0 to 4"):
            cross_entropy(logits, torch.tensor([0, wrong, 1]))

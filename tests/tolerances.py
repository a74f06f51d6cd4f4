"""One tolerance table by dtype: the largest ||out - ref|| / ||ref|| allowed.

The reference is fp64 on identically rounded inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRADIENT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 3e-3}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in fp64 (complex128); ||out|| where ref is zero; NaN is infinite."""
    wide = torch.complex128 if ref.is_complex() else torch.float64
    out, ref = out.detach().to("cpu", wide), ref.detach().to("cpu", wide)
    assert out.shape == ref.shape, f"shapes {tuple(out.shape)} and {tuple(ref.shape)} differ"
    if out.numel() == 0:
        return 0.0
    error = float(torch.linalg.vector_norm(out - ref))
    size = float(torch.linalg.vector_norm(ref))
    if error != error:
        return float("inf")
    return error / size if size > 0 else error


def assert_close(out: Tensor, ref: Tensor, tolerance: float, what: str = "") -> None:
    """Assert that `out` is within relative `tolerance` of `ref`, both in norm."""
    error = relative_error(out, ref)
    assert error <= tolerance, f"{what}: relative error {error:.3g} above {tolerance:.3g}"

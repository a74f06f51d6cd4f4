"""RMSNorm over the last axis (Zhang & Sennrich, arXiv 1910.07467), with the residual add fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_modal.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (fp64 for fp64)."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_model); returns the same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor, residual_in_fp32: bool = True) -> tuple[Tensor, Tensor]:
        """(norm(x + residual) in x's dtype, x + residual in fp32 or x's dtype)."""
        return rms_norm(x, self.weight, residual=residual, eps=self.eps, residual_in_fp32=residual_in_fp32)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

"""What one direction of a bidirectional scan has of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScanDirection:
    """What one direction of `bidirectional_scan` has of its own: arguments of `selective_scan`.

    delta: (batch, length, d_inner), dtype of u. A: (d_inner, d_state) fp32 (fp64 beside fp64 inputs). B, C:
    (batch, length, [groups,] d_state), dtype of u. D, delta_bias: (d_inner,), dtype of A.
    """

    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    delta_bias: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The fields in their order."""
        return self.delta, self.A, self.B, self.C, self.D, self.delta_bias

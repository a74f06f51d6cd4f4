"""What the forward and the backward Triton kernels of `rms_norm` share.

A row is one group of channels of one position. A program takes a tile of rows, [ROWS, BLOCK], and sums in
fp32: narrow rows several at a time, so that loads are wide and no lane idles; rows of up to `WHOLE` channels
stay in registers and are read once; wider ones go through in blocks, twice. Memory bound: with x in bf16 and
the residual in fp32 the forward moves 6 bytes in and 6 out an element, the backward 10 in and 6 out.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.norm.launch import NormLaunch


@triton.jit
def load(row, c, mask):
    return tl.load(row + c, mask=mask, other=0.0).to(tl.float32)


def as_rows(t: Tensor) -> Tensor:
    """(..., dim) as (rows, dim) with neighbouring channels; a copy only where strides leave no other way."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def aot_arguments(dim: int, residual: bool, gate: str | None, launch: NormLaunch) -> dict[str, Any]:
    """What both kernels take, by name, as a launch on contiguous inputs gives it; parameters in fp32."""
    given: dict[str, Any] = {"gate_stride": dim, "groups": 1, "width": dim, "ROWS": launch.rows}
    given |= {"BLOCK": launch.block, "ONE": launch.one, "WEIGHT": True, "RESIDUAL": residual}
    given |= {"GATE_FIRST": gate == "first", "GATE_LAST": gate == "last"}
    return given | dict.fromkeys(("weight", "rstd"), "*fp32")


def aot_config(dim: int, dtype: str, residual: bool, gate: str | None) -> str:
    """A case's name."""
    return f"dim {dim} {dtype}{' residual' if residual else ''}{f' gate {gate}' if gate else ''}"

"""Stores of what several lanes of a Triton kernel hold, without an exchange between them."""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import triton
import triton.language as tl

from ssm_modal.kernels.triton_math import NVIDIA


@triton.jit
def store_held(place, x, mask):
    """`tl.store` of x, of 16 or 32 bits, by the lanes that hold it, several the same after a reduction.

    Triton would first bring it to lanes one by one, through shared memory and with a barrier, and all its
    holders would write it there.
    """
    if not NVIDIA:
        tl.store(place, x, mask=mask)
    elif x.dtype.primitive_bitwidth == 16:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.b16 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,h,r",
            [place.to(tl.int64, bitcast=True), x.to(tl.int16, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [place.to(tl.int64, bitcast=True), x.to(tl.int32, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

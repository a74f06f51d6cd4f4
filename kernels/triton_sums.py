"""Sums over the programs of a kernel: the second half of a gradient that many programs share.

A backward kernel writes one row of fp32 partial sums a program; here they are added up in a fixed order, so
that two runs agree to the bit, and land in their places in their own dtypes, all in one launch.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.triton_stores import store_held

# Rows are added in tiles of at most this many, in channel blocks of this width: many programs even where
# there are few channels, with 4 KiB under way a warp.
MOST_ROWS, BLOCK = 512, 16


@functools.lru_cache(maxsize=256)
def _tile(rows: int) -> tuple[int, int]:
    """(rows of a tile, warps)."""
    tile = max(16, min(MOST_ROWS, 1 << (rows - 1).bit_length()))
    return tile, max(1, tile * BLOCK // 1024)


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(
    partial,  # (rows, K + 1 or K, width) fp32, contiguous
    main,  # (width, K), contiguous
    last,  # (width,)
    rows,
    width,
    K: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1)
    r = tl.arange(0, ROWS)
    mask = c < width
    at = partial + plane * width + c[None, :] + r[:, None].to(tl.int64) * PLANES * width
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    i = rows * 0
    while i < rows:
        sums += tl.load(at, mask=mask[None, :] & (i + r < rows)[:, None], other=0.0)
        at += ROWS * PLANES * tl.cast(width, tl.int64)
        i += ROWS
    total = tl.sum(sums, 0)
    if plane < K:
        store_held(main + c * K + plane, total.to(main.dtype.element_ty), mask)
    elif HAS_LAST:
        store_held(last + c, total.to(last.dtype.element_ty), mask)


def column_sums(partial: Tensor, main: Tensor, last: Tensor | None = None) -> None:
    """Sum `partial` over its rows into `main` and `last`, in fp32, in a fixed order.

    partial: (rows, planes, width) fp32, contiguous. main: (width, K) contiguous, K planes of sums, the last
    axis first. last: (width,), the sums of plane K, or None where there is none or it is not wanted.
    """
    rows, planes, width = partial.shape
    taps = main.shape[1]
    if width == 0:
        return
    _launcher(*_tile(rows), planes, taps, last is not None)(
        (-(-width // BLOCK), taps + (last is not None)),
        (partial, main, main if last is None else last),
        (rows, width),
    )


@functools.lru_cache(maxsize=256)
def _launcher(tile: int, warps: int, planes: int, taps: int, has_last: bool) -> Launcher:
    constants = {"K": taps, "HAS_LAST": has_last, "PLANES": planes, "ROWS": tile, "BLOCK": BLOCK}
    return Launcher(column_sums_kernel, constants | {"num_warps": warps})


def aot_cases() -> list[AotCase]:
    """The convolution's sums and the norm's, of many rows and of few."""
    cases = []
    for taps, has_last, dtype, rows in (
        (4, True, "bf16", 512),
        (1, False, "fp32", 2000),
        (1, False, "fp32", 16),
    ):
        tile, warps = _tile(rows)
        given = {"partial": "*fp32", "main": "*" + dtype, "last": "*" + dtype, "rows": rows, "width": 2048}
        given |= {"K": taps, "HAS_LAST": has_last, "PLANES": taps + has_last, "ROWS": tile, "BLOCK": BLOCK}
        config = f"{taps} planes{' and a last' if has_last else ''} {dtype} in {tile}"
        cases.append(AotCase(column_sums_kernel, config, given, num_warps=warps))
    return cases

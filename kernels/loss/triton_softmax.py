"""Triton kernel of `cross_entropy`: log(sum exp) of each row, in two parts, and with it the row's softmax.

A program takes a row of logits, tens of thousands wide, and reads it twice: for its log(sum exp), which is
taken block after block beside the largest logit so far, and for the softmax, when the row stands in the
cache. Memory bound: of half-precision logits 2 bytes in and 2 out an element.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher

BLOCK, WARPS = 4096, 8
"""Logits of a row at a time, and the warps that hold them, 16 a thread."""


@triton.jit(do_not_specialize=["width"])
def softmax_kernel(
    logits,  # (rows, width), rows logits_stride apart
    softmax,  # (rows, width), contiguous: times the scale, in the logits' dtype
    largest_of,  # (rows,) fp32: the largest logit
    rest_of,  # (rows,) fp32: log(sum exp(logits - largest))
    scale,  # () fp32
    logits_stride,
    width,
    SOFTMAX: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits + row * logits_stride
    c = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    at = width * 0
    while at < width:
        x = tl.load(logits_row + at + c, mask=at + c < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # of nothing but -inf so far: no difference of two
        sums = sums * tl.exp(largest - base) + tl.exp(x - base)
        largest = new
        at += BLOCK
    base = tl.where(largest == float("-inf"), 0.0, largest)
    rest = tl.log(tl.sum(sums, 0))
    tl.store(largest_of + row, base)
    tl.store(rest_of + row, rest)
    if SOFTMAX:
        factor = tl.full((), 1.0, tl.float32)
        if SCALED:
            factor = tl.load(scale)
        out_row = softmax + row * width
        at = width * 0
        while at < width:
            mask = at + c < width
            x = tl.load(logits_row + at + c, mask=mask, other=float("-inf")).to(tl.float32)
            tl.store(
                out_row + at + c, (tl.exp(x - base - rest) * factor).to(softmax.dtype.element_ty), mask=mask
            )
            at += BLOCK


def row_softmax(logits: Tensor, scale: Tensor | None, softmax: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each row the largest logit m and log(sum exp(logits - m)), (rows,) in fp32 each, and `scale` times
    the softmax in the logits' dtype, or None. Apart, since their sum would lose the second's last digits."""
    rows, width = logits.shape
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    both = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    largest, rest = both[0], both[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device) if softmax else None
    if rows > 0:
        _launcher(softmax, scale is not None)(
            (rows,),
            (
                x,
                x if out is None else out,
                largest,
                rest,
                rest if scale is None else scale.to(torch.float32),
            ),
            (x.stride(0), width),
        )
    return largest, rest, out


@functools.cache
def _launcher(softmax: bool, scaled: bool) -> Launcher:
    constants = {"SOFTMAX": softmax, "SCALED": scaled, "BLOCK": BLOCK}
    return Launcher(softmax_kernel, constants | {"num_warps": WARPS})


def aot_cases() -> list[AotCase]:
    """A vocabulary whose rows are aligned and one whose are not, with the softmax and without."""
    cases = []
    for dtype in ("fp32", "bf16"):
        for width, softmax, scaled in ((50280, True, False), (50257, True, True), (50280, False, False)):
            given = {
                "logits": "*" + dtype,
                "softmax": "*" + dtype,
                "largest_of": "*fp32",
                "rest_of": "*fp32",
                "scale": "*fp32",
            }
            given |= {"logits_stride": width, "width": width, "SOFTMAX": softmax, "SCALED": scaled}
            config = f"{width} {dtype}{' softmax' if softmax else ''}{' scaled' if scaled else ''}"
            cases.append(AotCase(softmax_kernel, config, given | {"BLOCK": BLOCK}, num_warps=WARPS))
    return cases

"""Functions of one number that several Triton kernels need, in fp32."""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ssm_modal.kernels.dispatch import interpreting

LOG2E = tl.constexpr(1.4426950408889634)

# Triton's exp2 and division scale their arguments round subnormal numbers, a third of all instructions of the
# convolution's forward; a sigmoid has no use for them. The interpreter and other makes of GPU have no such
# assembly.
NVIDIA = tl.constexpr(not interpreting() and torch.version.hip is None)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), relative error below 1e-6."""
    e = x * -LOG2E
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [e],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(e))


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + e^x), relatively accurate down to the smallest normal number.

    max(x, 0) + log1p(e) with e = e^-|x| in (0, 1], and log1p(e) = 2 artanh(s), s = e / (2 + e), which keeps
    results below 1e-7 where log(1 + e) loses them. For (artanh(s) / s - 1) / s^2 stands a cubic in
    s^2 <= 1/9, the one whose largest relative error in artanh is least: 4.5e-9 (Remez). Above torch's
    threshold of 20 log1p(e) is below half a unit in the last place of x.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if NVIDIA:
        s = e * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [2.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        s = e / (2.0 + e)
    q = s * s
    p = 0.14000902700905876 + q * 0.14005993124590804
    p = 0.20010763615125268 + q * p
    p = 0.3333320814293106 + q * p
    s += s
    return tl.maximum(x, 0.0) + (s + s * q * p)

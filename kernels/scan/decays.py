"""Decays exp2(rate * dt) of a tile of states, some of them by a polynomial.

A multiprocessor computes 16 exponentials a clock, an eighth of what it multiplies and adds. Kernels that do
little else wait for the unit that does, with issue slots to spare: so a few of a lane's exponentials are
computed on the other units, in eleven instructions.

2^x = 2^round(x) * 2^f with |f| <= 1/2: the power of two is added to the exponent's bits, and 2^f = 1 + f P(f)
with P of degree 4, which errs by 1.7e-7 in fp32; `ex2.approx` errs by about as much. Below -126 the result is
2^-126 where it should be smaller, from 128 on infinite; NaN stays NaN.
"""

# Triton kernels are a language of their own, which mypy cannot read.
# mypy: ignore-errors
from __future__ import annotations

import functools
import struct

import triton
import triton.language as tl

from ssm_modal.kernels.scan.launch import padded_state
from ssm_modal.kernels.triton_math import NVIDIA

WARP = 32
# Numbers of a lane that one piece of assembly takes.
TOGETHER = tl.constexpr(16)
# Of P, from the constant on: least relative error of 1 + f P(f) on |f| <= 1/2 (Remez).
COEFFICIENTS = (
    0.6931469775991633,
    0.24022242085375106,
    0.05550733743251787,
    0.009671512639648326,
    0.0013264727197236127,
)
# Added to a number below 2^22 it leaves the nearest integer in the lowest bits.
ROUND = 1.5 * 2**23


def _hex(x: float) -> str:
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"


@functools.cache
def decay_assembly(polynomials: int) -> tuple[str, str]:
    """PTX and constraints: 2^x of each of TOGETHER numbers of a lane, `polynomials` of them by a polynomial.

    These are spread over the registers, for both units to have work at any time.
    """
    registers = TOGETHER.value
    chosen = {(2 * k + 1) * registers // (2 * polynomials) for k in range(polynomials)}
    lines = [".reg .f32 x, t, f, p;", ".reg .b32 i, w;"]
    for r in range(registers):
        if r not in chosen:
            lines += [f"ex2.approx.ftz.f32 ${r}, ${registers + r};"]
            continue
        lines += [
            f"max.NaN.f32 x, ${registers + r}, {_hex(-126.0)};",
            f"min.NaN.f32 x, x, {_hex(128.0)};",
            f"add.rn.f32 t, x, {_hex(ROUND)};",
            f"sub.rn.f32 f, t, {_hex(ROUND)};",
            "sub.rn.f32 f, x, f;",
            f"mov.f32 p, {_hex(COEFFICIENTS[-1])};",
            *(f"fma.rn.f32 p, p, f, {_hex(c)};" for c in COEFFICIENTS[-2::-1]),
            f"fma.rn.f32 p, p, f, {_hex(1.0)};",
            "mov.b32 i, t;",
            "shl.b32 i, i, 23;",
            "mov.b32 w, p;",
            "add.s32 i, i, w;",
            f"mov.b32 ${r}, i;",
        ]
    return (
        "{ " + " ".join(lines) + " }",
        ",".join(["=f"] * registers + ["f"] * registers),
    )


@functools.cache
def decay(d_state: int, block: int, polynomials: int) -> dict[str, object]:
    """Constants of a kernel with tiles of `block` channels: DECAY and its constraints.

    polynomials: of every TOGETHER exponentials of a lane. DECAY is None where there are none, where a lane
    has fewer than those together, and where there is no assembly.
    """
    if padded_state(d_state) * block < TOGETHER.value * WARP or polynomials == 0 or not NVIDIA.value:
        return {"DECAY": None, "DECAY_CONSTRAINTS": None}
    code, constraints = decay_assembly(polynomials)
    return {"DECAY": code, "DECAY_CONSTRAINTS": constraints}


@triton.jit
def decays(rate, dt, DECAY: tl.constexpr, DECAY_CONSTRAINTS: tl.constexpr):
    """exp2(rate * dt) [N, D] of rates [N, D] and step sizes [D]."""
    x = rate * dt[None, :]
    if DECAY is None:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            DECAY,
            DECAY_CONSTRAINTS,
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=TOGETHER,
        )

"""Triton kernel of one step of the selective scan: one launch, nothing read back, graph-capturable.

A program takes a block of channels of one row through the step, all states in a tile [BLOCK_D, BLOCK_N].
Each state is read once and written once, by one program; it may be written over where it was read.
"""

# mypy: ignore-errors
# Triton kernels are a language of their own, which mypy cannot read.
from __future__ import annotations

import functools
import itertools

import triton
import triton.language as tl
from torch import Tensor

from ssm_modal.kernels.aot import AotCase
from ssm_modal.kernels.launching import Launcher
from ssm_modal.kernels.triton_math import LOG2E, silu, softplus
from ssm_modal.kernels.triton_stores import store_held

# States of one program: few, so that one row of a small model still spreads over many multiprocessors.
TILE, WARPS = 512, 4
# Of fewer channels than threads Triton loads a row where it is needed; of as many it exchanges them.
CHANNELS = 64


@triton.jit(do_not_specialize=["u_stride", "delta_stride", "z_stride", "B_stride_b", "C_stride_b"])
def scan_step_kernel(
    u,  # (batch, d_inner), rows u_stride apart
    delta,  # as u
    A,  # (d_inner, d_state)
    B,  # (batch, groups, d_state)
    C,  # (batch, groups, d_state)
    D,  # (d_inner,)
    z,  # as u
    delta_bias,  # (d_inner,)
    state,  # (batch, d_inner, d_state), any strides
    out,  # (batch, d_inner), contiguous
    new_state,  # (batch, d_inner, d_state), any strides; may be `state`
    d_inner,
    d_state,
    group_channels,
    u_stride,
    delta_stride,
    z_stride,
    A_stride_d,
    A_stride_n,
    B_stride_b,
    B_stride_g,
    B_stride_n,
    C_stride_b,
    C_stride_g,
    C_stride_n,
    s_stride_b,
    s_stride_d,
    s_stride_n,
    w_stride_b,
    w_stride_d,
    w_stride_n,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    blocks_d = tl.cdiv(d_inner, BLOCK_D)
    row = (tl.program_id(0) // blocks_d).to(tl.int64)
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    d_mask, n_mask = d < d_inner, n < d_state
    mask = d_mask[:, None] & n_mask[None, :]
    wide_d = d.to(tl.int64)

    x = tl.load(u + row * u_stride + d, mask=d_mask, other=0.0).to(tl.float32)
    dt = tl.load(delta + row * delta_stride + d, mask=d_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(delta_bias + d, mask=d_mask, other=0.0)
    if SOFTPLUS:
        dt = softplus(dt)
    rate = tl.load(A + wide_d[:, None] * A_stride_d + n[None, :] * A_stride_n, mask=mask, other=0.0)
    B += row * B_stride_b
    C += row * C_stride_b
    if ONE_GROUP:
        b = tl.load(B + n * B_stride_n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        c = tl.load(C + n * C_stride_n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    else:
        group = (d // group_channels).to(tl.int64)[:, None]
        b = tl.load(B + group * B_stride_g + n[None, :] * B_stride_n, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(C + group * C_stride_g + n[None, :] * C_stride_n, mask=mask, other=0.0).to(tl.float32)
    at = row * s_stride_b + wide_d[:, None] * s_stride_d + n[None, :].to(tl.int64) * s_stride_n
    h = tl.load(state + at, mask=mask, other=0.0)

    h = tl.exp2(dt[:, None] * rate * LOG2E) * h + (dt * x)[:, None] * b
    y = tl.sum(h * c, 1)
    if HAS_D:
        y += tl.load(D + d, mask=d_mask, other=0.0) * x
    if HAS_Z:
        y *= silu(tl.load(z + row * z_stride + d, mask=d_mask, other=0.0).to(tl.float32))
    store_held(out + row * d_inner + d, y.to(out.dtype.element_ty), d_mask)
    at = row * w_stride_b + wide_d[:, None] * w_stride_d + n[None, :].to(tl.int64) * w_stride_n
    tl.store(new_state + at, h, mask=mask)


def _blocks(d_inner: int, d_state: int) -> tuple[int, int]:
    """(channels, padded states) of a program."""
    block_n = 1 << (d_state - 1).bit_length()
    return max(2, min(TILE // block_n, CHANNELS, 1 << (d_inner - 1).bit_length())), block_n


def _row(t: Tensor) -> Tensor:
    """`t` with neighbouring last elements: a copy only where it has none."""
    return t if t.stride(-1) == 1 else t.contiguous()


def selective_scan_step_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    new_state: Tensor,
) -> Tensor:
    """Write the state after the step into `new_state`, which may be `state`; returns out (batch, d_inner).

    Arguments as `selective_scan_step` has checked them; B, C: (batch, groups, d_state).
    """
    batch, d_inner = u.shape
    d_state, groups = A.shape[1], B.shape[1]
    out = u.new_empty((batch, d_inner))
    if batch * d_inner == 0:
        return out
    u, delta = _row(u), _row(delta)
    z = None if z is None else _row(z)
    launcher = _launcher(
        d_inner, d_state, D is not None, z is not None, delta_bias is not None, delta_softplus, groups == 1
    )
    launcher(
        (batch * -(-d_inner // launcher.constants["BLOCK_D"]),),
        (
            u,
            delta,
            A,
            B,
            C,
            u if D is None else _row(D),
            u if z is None else z,
            u if delta_bias is None else _row(delta_bias),
            state,
            out,
            new_state,
        ),
        (
            d_inner,
            d_state,
            d_inner // groups,
            u.stride(0),
            delta.stride(0),
            0 if z is None else z.stride(0),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *state.stride(),
            *new_state.stride(),
        ),
    )
    return out


@functools.lru_cache(maxsize=256)
def _launcher(
    d_inner: int, d_state: int, has_D: bool, has_z: bool, has_bias: bool, softplus: bool, one_group: bool
) -> Launcher:
    block_d, block_n = _blocks(d_inner, d_state)
    constants = {
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "HAS_D": has_D,
        "HAS_Z": has_z,
        "HAS_BIAS": has_bias,
        "SOFTPLUS": softplus,
        "ONE_GROUP": one_group,
    }
    return Launcher(scan_step_kernel, constants | {"num_warps": WARPS})


def aot_cases() -> list[AotCase]:
    """Small and large states, with every option, one group and several."""
    cases = []
    for (d_state, groups), dtype in itertools.product(((1, 1), (16, 1), (16, 4), (256, 1)), ("fp32", "bf16")):
        d_inner = 2048
        block_d, block_n = _blocks(d_inner, d_state)
        given = dict.fromkeys(("u", "delta", "B", "C", "z", "out"), "*" + dtype)
        given |= dict.fromkeys(("A", "D", "delta_bias", "state", "new_state"), "*fp32")
        given |= {"d_inner": d_inner, "d_state": d_state, "group_channels": d_inner // groups}
        given |= dict.fromkeys(("u_stride", "delta_stride", "z_stride"), 2 * d_inner)
        given |= {"A_stride_d": d_state, "A_stride_n": 1}
        for m in ("B", "C"):
            given |= {f"{m}_stride_b": groups * d_state, f"{m}_stride_g": d_state, f"{m}_stride_n": 1}
        for m in ("s", "w"):
            given |= {f"{m}_stride_b": d_inner * d_state, f"{m}_stride_d": d_state, f"{m}_stride_n": 1}
        given |= {"BLOCK_D": block_d, "BLOCK_N": block_n, "ONE_GROUP": groups == 1}
        given |= dict.fromkeys(("HAS_D", "HAS_Z", "HAS_BIAS", "SOFTPLUS"), True)
        config = f"N{d_state} groups {groups} {dtype}"
        cases.append(AotCase(scan_step_kernel, config, given, num_warps=WARPS, minor=dtype == "fp32"))
    return cases

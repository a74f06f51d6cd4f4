"""The compiled kernels as plain functions on validated fp32 CPU tensors.

`op.py` of each op checks the arguments and calls these. Shapes: u, delta, z, x, out (batch, length, d_inner);
A (d_inner, d_state); B, C (batch, length, groups, d_state); D, delta_bias, bias (d_inner,); scan states
(batch or sequences, d_inner, d_state); conv weight (d_inner, d_conv) and states (batch or sequences, d_inner,
d_conv - 1), the last inputs in scan order, the oldest first. All fp32 on the CPU, any strides; where a last
axis does not have stride 1 a copy is made. Results are contiguous and do not depend on thread timing: the
same call with the same number of threads (`torch.get_num_threads()`) gives the same bits.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssm_modal.kernels.cpu.loader import library
from ssm_modal.kernels.sequences import Sequences

# The fields of ScanArgs in selective_scan.h, in order; every one takes eight bytes.
_SCAN_FIELDS = """
    batch length channels states groups sequences borders reverse softplus tile threads
    u delta z dout u_batch u_time delta_batch delta_time z_batch z_time dout_batch dout_time
    B C B_batch B_time B_group C_batch C_time C_group A D delta_bias initial out final kept dfinal
    du ddelta dz dA dD ddelta_bias dB dC dinitial
"""

# The fields of ConvArgs in causal_conv1d.h, likewise.
_CONV_FIELDS = """
    batch length channels width sequences borders reverse silu threads
    x dout x_batch x_time dout_batch dout_time weight bias initial out final dfinal
    dx dweight dbias dinitial
"""


class _ScanArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _SCAN_FIELDS.split()]


class _ConvArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _CONV_FIELDS.split()]


def _call(name: str, args: ctypes.Structure) -> None:
    if getattr(library(), name)(ctypes.byref(args)) != 0:
        raise MemoryError(f"{name}: no memory for scratch buffers")


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with stride 1 along its last axis."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def tile_steps(d_state: int) -> int:
    """Steps between two states that forward keeps for backward: fewer where a state is small."""
    return 32 if d_state <= 32 else 64 if d_state <= 64 else 128


def boundaries_shape(
    batch: int, length: int, d_inner: int, d_state: int, seqs: Sequences | None
) -> tuple[int, int, int]:
    """Shape of the third result of `selective_scan_fwd`: (tiles, d_state, d_inner)."""
    tile = tile_steps(d_state)
    if seqs is None:
        return batch * ((length + tile - 1) // tile), d_state, d_inner
    return sum((n + tile - 1) // tile for n in seqs.lengths), d_state, d_inner


def _scan_args(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seqs: Sequences | None,
    reverse: bool,
    borders: Tensor | None,
) -> _ScanArgs:
    batch, length, d_inner = u.shape
    args = _ScanArgs(
        batch=batch,
        length=length,
        channels=d_inner,
        states=A.shape[1],
        groups=B.shape[2],
        sequences=batch if seqs is None else seqs.n,
        borders=_at(borders),
        reverse=reverse,
        softplus=delta_softplus,
        tile=tile_steps(A.shape[1]),
        threads=torch.get_num_threads(),
        A=_at(A),
        D=_at(D),
        delta_bias=_at(delta_bias),
    )
    args.u, args.u_batch, args.u_time = u.data_ptr(), u.stride(0), u.stride(1)
    args.delta, args.delta_batch, args.delta_time = delta.data_ptr(), delta.stride(0), delta.stride(1)
    if z is not None:
        args.z, args.z_batch, args.z_time = z.data_ptr(), z.stride(0), z.stride(1)
    args.B, args.B_batch, args.B_time, args.B_group = B.data_ptr(), B.stride(0), B.stride(1), B.stride(2)
    args.C, args.C_batch, args.C_time, args.C_group = C.data_ptr(), C.stride(0), C.stride(1), C.stride(2)
    return args


def _borders(seqs: Sequences | None) -> Tensor | None:
    return None if seqs is None else seqs.cu_seqlens.contiguous()


def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    save_boundaries: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final_state, boundaries), the last of `boundaries_shape`: what backward needs of the states.

    With `save_boundaries=False` boundaries is empty (0, d_state, d_inner).
    """
    batch, length, d_inner = u.shape
    d_state = A.shape[1]
    n = batch if seqs is None else seqs.n
    out = torch.empty(batch, length, d_inner)
    final = torch.empty(n, d_inner, d_state)
    shape = boundaries_shape(batch, length, d_inner, d_state, seqs)
    boundaries = torch.empty(shape if save_boundaries else (0, d_state, d_inner))
    if n == 0 or d_inner == 0:
        return out, final, boundaries
    u, delta, B, C = _rows(u), _rows(delta), _rows(B), _rows(C)
    z = None if z is None else _rows(z)
    A, D, delta_bias, initial_state = A.contiguous(), _dense(D), _dense(delta_bias), _dense(initial_state)
    borders = _borders(seqs)
    args = _scan_args(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seqs, reverse, borders)
    args.initial, args.out, args.final = _at(initial_state), _at(out), _at(final)
    args.kept = _at(boundaries) if save_boundaries else 0
    _call("ssm_selective_scan_fwd", args)
    return out, final, boundaries


def selective_scan_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    boundaries: Tensor,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where the argument was None.

    `boundaries` is the third result of `selective_scan_fwd` on the same arguments.
    """
    batch, length, d_inner = u.shape
    d_state, groups = A.shape[1], B.shape[2]
    n = batch if seqs is None else seqs.n
    du, ddelta = torch.empty(batch, length, d_inner), torch.empty(batch, length, d_inner)
    dz = None if z is None else torch.empty(batch, length, d_inner)
    dA = torch.empty(d_inner, d_state)
    dB, dC = torch.empty(batch, length, groups, d_state), torch.empty(batch, length, groups, d_state)
    dD = None if D is None else torch.empty(d_inner)
    ddelta_bias = None if delta_bias is None else torch.empty(d_inner)
    dinitial = None if initial_state is None else torch.empty(n, d_inner, d_state)
    if n == 0 or d_inner == 0:
        for grad in (dA, dB, dC, dD, ddelta_bias):
            if grad is not None:
                grad.zero_()
        return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial
    u, delta, B, C, dout = _rows(u), _rows(delta), _rows(B), _rows(C), _rows(dout)
    z = None if z is None else _rows(z)
    A, D, delta_bias, dfinal_state = A.contiguous(), _dense(D), _dense(delta_bias), _dense(dfinal_state)
    borders = _borders(seqs)
    args = _scan_args(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seqs, reverse, borders)
    args.dout, args.dout_batch, args.dout_time = dout.data_ptr(), dout.stride(0), dout.stride(1)
    args.kept, args.dfinal = _at(boundaries), _at(dfinal_state)
    args.du, args.ddelta, args.dz, args.dA, args.dB, args.dC = map(_at, (du, ddelta, dz, dA, dB, dC))
    args.dD, args.ddelta_bias, args.dinitial = _at(dD), _at(ddelta_bias), _at(dinitial)
    _call("ssm_selective_scan_bwd", args)
    return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial


def _conv_args(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    borders: Tensor | None,
) -> _ConvArgs:
    batch, length, d_inner = x.shape
    return _ConvArgs(
        batch=batch,
        length=length,
        channels=d_inner,
        width=weight.shape[1],
        sequences=batch if seqs is None else seqs.n,
        borders=_at(borders),
        reverse=reverse,
        silu=silu,
        threads=torch.get_num_threads(),
        x=_at(x),
        x_batch=x.stride(0),
        x_time=x.stride(1),
        weight=_at(weight),
        bias=_at(bias),
        initial=_at(initial_state),
    )


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, final_state)."""
    batch, length, d_inner = x.shape
    n = batch if seqs is None else seqs.n
    out = torch.empty(batch, length, d_inner)
    final = torch.empty(n, d_inner, weight.shape[1] - 1)
    if n == 0 or d_inner == 0:
        return out, final
    x, weight, bias, initial_state = _rows(x), weight.contiguous(), _dense(bias), _dense(initial_state)
    borders = _borders(seqs)
    args = _conv_args(x, weight, bias, silu, initial_state, seqs, reverse, borders)
    args.out, args.final = _at(out), _at(final)
    _call("ssm_causal_conv1d_fwd", args)
    return out, final


def causal_conv1d_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_state), None where the argument was None."""
    batch, length, d_inner = x.shape
    n = batch if seqs is None else seqs.n
    dx = torch.empty(batch, length, d_inner)
    dweight = torch.empty(weight.shape)
    dbias = None if bias is None else torch.empty(d_inner)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape)
    if n == 0 or d_inner == 0:
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        return dx, dweight, dbias, dinitial
    x, dout, weight, bias = _rows(x), _rows(dout), weight.contiguous(), _dense(bias)
    initial_state, dfinal_state = _dense(initial_state), _dense(dfinal_state)
    borders = _borders(seqs)
    args = _conv_args(x, weight, bias, silu, initial_state, seqs, reverse, borders)
    args.dout, args.dout_batch, args.dout_time = _at(dout), dout.stride(0), dout.stride(1)
    args.dfinal, args.dx, args.dweight, args.dbias = map(_at, (dfinal_state, dx, dweight, dbias))
    args.dinitial = _at(dinitial)
    _call("ssm_causal_conv1d_bwd", args)
    return dx, dweight, dbias, dinitial

"""The selective scan in chunks, in pure torch: backend "torch". Any device, any floating dtype with fp64.

Time is cut in chunks of at most 64 steps. Given the state that enters it, a chunk is independent of the
others, so many chunks are worked on at once and the Python loop runs over the steps of one chunk:

    pass 1   each chunk from a zero state: its last state and the sum of dt
    pass 2   the carry over chunks: entering states, h_out = exp(A * sum dt) * h_in + last state
    pass 3   each chunk from its entering state: the outputs

Where batch x d_inner x d_state is large already, one pass goes chunk after chunk instead. The backward keeps
the entering states only and rebuilds the states inside a chunk; the adjoint of the state,

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1},

is a scan of the same form against time and takes the same passes. Nothing is inverted and nothing is divided
by a decay. Packed sequences are cut by a chunk table, so that no chunk crosses a border.
The layout is described in `rows.py`.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.precision import without_autocast
from ssm_modal.kernels.scan.carry import carry_entering
from ssm_modal.kernels.scan.rows import Cut, Rows, chunk_size, from_groups, in_groups, prepare
from ssm_modal.kernels.sequences import Sequences


def boundaries_shape(
    batch: int, length: int, d_inner: int, d_state: int, groups: int, lengths: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Shape of the `boundaries` that `selective_scan_fwd` returns: one entering state a chunk."""
    size = chunk_size(max(lengths) if lengths else length)
    rows = batch * -(-length // size) if lengths is None else sum(-(-n // size) for n in lengths)
    return rows, groups, d_state, d_inner // groups if groups else 0


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    dt = delta.to(state_dtype(delta.dtype))
    if delta_bias is not None:
        dt = dt + delta_bias
    return F.softplus(dt, threshold=20.0) if delta_softplus else dt


def _blocks(total: int, a_row: int, target: int) -> list[slice]:
    """Rows worked on at once: about `target` state elements."""
    take = max(1, target // max(a_row, 1))
    return [slice(at, min(at + take, total)) for at in range(0, total, take)]


def _serial(rows: Rows, cut: Cut) -> bool:
    """Whether one pass, chunk after chunk, has enough to do at each step."""
    a_step = cut.batch * math.prod(rows.state_shape)
    return cut.table is None and (cut.per_batch == 1 or a_step >= (1 << 20 if rows.dt.is_cuda else 1 << 14))


def _target(device: torch.device, backward: bool) -> int:
    """State elements of one step of the Python loop: few enough for the CPU's cache, enough to fill a GPU."""
    if device.type == "cpu":
        return 1 << 17
    return 1 << 19 if backward else 1 << 21


def _last_states(rows: Rows, drive: Tensor, vector: Tensor, reverse: bool, adjoint: bool) -> Tensor:
    """Pass 1: the last state of each chunk from a zero state, (rows, groups, d_state, channels).

    Forward: h = exp(dt A) h + B x, with drive x and vector B. Adjoint: q = exp(dt A) (q + C dy), against the
    scan's direction, with drive dy and vector C.
    """
    last = torch.empty(rows.n, *rows.state_shape, dtype=rows.dt.dtype, device=rows.dt.device)
    for block in _blocks(rows.n, math.prod(rows.state_shape), _target(last.device, False)):
        h = last[block].zero_()
        decay = torch.empty_like(h)
        dt, dv, v = rows.dt[block].unbind(1), drive[block].unbind(1), vector[block].unsqueeze(-1).unbind(1)
        for t in rows.order(reverse != adjoint):
            torch.mul(dt[t], rows.A_log2, out=decay).exp2_()
            if adjoint:
                h.addcmul_(v[t], dv[t]).mul_(decay)
            else:
                h.mul_(decay).addcmul_(v[t], dv[t])
    return last


def _entering(
    rows: Rows, cut: Cut, last: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Pass 2: the state entering each chunk, and the one leaving the last chunk of each sequence."""
    decay = torch.exp2(rows.dt.sum(1) * rows.A_log2)
    if cut.table is None:
        shape = (cut.batch, cut.per_batch, *rows.state_shape)
        entering, final = carry_entering(decay.view(shape), last.view(shape), initial, None, reverse)
        return entering.reshape(last.shape), final
    entering, final = carry_entering(decay.unsqueeze(0), last.unsqueeze(0), initial, cut.table, reverse)
    return entering.squeeze(0), final


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final_state, boundaries) on checked arguments; B, C: (batch, length, groups, d_state).

    boundaries: the state entering each chunk, (chunks, groups, d_state, d_inner / groups).
    """
    with without_autocast(u.device):
        return _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seqs, reverse)


def _forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    cut = Cut.of(u, seqs)
    groups = B.shape[2]
    rows = prepare(u, _step_sizes(delta, delta_bias, delta_softplus), A, B, C, cut)
    initial = None if initial_state is None else in_groups(initial_state, groups)
    y = torch.empty_like(rows.x)
    if _serial(rows, cut):
        boundaries, final = _serial_forward(rows, cut, initial, reverse, y)
    else:
        last = _last_states(rows, rows.x, rows.B, reverse, adjoint=False)
        boundaries, final = _entering(rows, cut, last, initial, reverse)
        for block in _blocks(rows.n, math.prod(rows.state_shape), _target(y.device, False)):
            _advance(rows, block, boundaries[block].clone(), reverse, y)
    out = cut.unrows(y.view(cut.n, cut.size, u.shape[2]))
    if D is not None:
        out = torch.addcmul(out, u.to(out.dtype), D)
    if z is not None:
        out = out * F.silu(z.to(out.dtype))
    return out.to(u.dtype).contiguous(), from_groups(final).contiguous(), boundaries


def _advance(rows: Rows, block: slice, h: Tensor, reverse: bool, y: Tensor) -> Tensor:
    """Run the chunks of `block` from their entering states `h` (overwritten), writing outputs to `y`."""
    decay = torch.empty_like(h)
    dt, x, out = rows.dt[block].unbind(1), rows.x[block].unbind(1), y[block].unbind(1)
    B, C = rows.B[block].unsqueeze(-1).unbind(1), rows.C[block].unsqueeze(-2).unbind(1)
    for t in rows.order(reverse):
        torch.mul(dt[t], rows.A_log2, out=decay).exp2_()
        h.mul_(decay).addcmul_(B[t], x[t])
        out[t].copy_(torch.matmul(C[t], h))
    return h


def _serial_forward(
    rows: Rows, cut: Cut, initial: Tensor | None, reverse: bool, y: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (cut.batch, cut.per_batch, *rows.state_shape)
    boundaries = torch.empty(shape, dtype=rows.dt.dtype, device=rows.dt.device)
    h = boundaries.new_zeros(cut.batch, *rows.state_shape) if initial is None else initial.clone()
    for k in range(cut.per_batch)[:: -1 if reverse else 1]:
        boundaries[:, k] = h
        h = _advance(rows, _strided(k, cut), h, reverse, y)
    return boundaries.view(rows.n, *rows.state_shape), h


def _strided(k: int, cut: Cut) -> slice:
    """The rows that are chunk `k` of each batch entry."""
    return slice(k, None, cut.per_batch)


Gradients: TypeAlias = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


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
) -> Gradients:
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where the argument was None."""
    with without_autocast(u.device):
        return _backward(
            dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seqs,
            reverse, boundaries,
        )  # fmt: skip


def _backward(
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
) -> Gradients:
    cut = Cut.of(u, seqs)
    groups = B.shape[2]
    wide = state_dtype(u.dtype)
    dt = _step_sizes(delta, delta_bias, delta_softplus)
    rows = prepare(u, dt, A, B, C, cut)
    dy = dout.to(wide)
    if z is not None:
        gate = torch.sigmoid(z.to(wide))
        dy = dy * (z * gate)
    grads = _Gradients(rows, cut.rows(dy).reshape(rows.x.shape), with_y=z is not None)
    carry = None if dfinal_state is None else in_groups(dfinal_state, groups)

    if _serial(rows, cut):
        leaving = boundaries.new_zeros(cut.batch, *rows.state_shape) if carry is None else carry.clone()
        for k in range(cut.per_batch)[:: 1 if reverse else -1]:
            block = _strided(k, cut)
            leaving = grads.run(block, boundaries[block].clone(), leaving, reverse)
        dinitial = leaving
    else:
        last = _last_states(rows, grads.dy, rows.C, reverse, adjoint=True)
        entering, dinitial = _entering(rows, cut, last, carry, not reverse)
        for block in _blocks(rows.n, math.prod(rows.state_shape), _target(u.device, True)):
            grads.run(block, boundaries[block].clone(), entering[block].clone(), reverse)

    dx = cut.unrows(grads.dx.view(cut.n, cut.size, u.shape[2]))
    ddt = cut.unrows(grads.ddt.view(cut.n, cut.size, u.shape[2])) + dx * u
    du = dx * dt
    dD = dz = ddelta_bias = None
    if D is not None:
        dD = (dy * u).sum((0, 1))
        du = torch.addcmul(du, dy, D)
    if z is not None:
        y = cut.unrows(grads.y.view(cut.n, cut.size, u.shape[2]))
        if D is not None:
            y = torch.addcmul(y, u.to(wide), D)
        dz = (dout * y * gate * (1 + z * (1 - gate))).to(z.dtype)
    if delta_softplus:
        raw = delta.to(wide) if delta_bias is None else delta + delta_bias
        ddt = torch.where(raw > 20.0, ddt, ddt * torch.sigmoid(raw))
    if delta_bias is not None:
        ddelta_bias = ddt.sum((0, 1))
    return (
        du.to(u.dtype).contiguous(),
        ddt.to(delta.dtype).contiguous(),
        grads.dA.transpose(1, 2).reshape(A.shape),
        cut.unrows(grads.dB).to(B.dtype).contiguous(),
        cut.unrows(grads.dC).to(C.dtype).contiguous(),
        dD,
        dz,
        ddelta_bias,
        None if initial_state is None else from_groups(dinitial).contiguous(),
    )


class _Gradients:
    """Buffers in rows for the gradients, and pass 3 of the backward, which fills them block by block."""

    def __init__(self, rows: Rows, dy: Tensor, with_y: bool) -> None:
        self.rows, self.dy = rows, dy
        self.dx, self.ddt = torch.empty_like(rows.x), torch.empty_like(rows.x)
        self.y = torch.empty_like(rows.x) if with_y else rows.x
        self.with_y = with_y
        self.dB, self.dC = torch.empty_like(rows.B), torch.empty_like(rows.C)
        self.dA = torch.zeros_like(rows.A)
        self.kept: Tensor | None = None

    def run(self, block: slice, h: Tensor, q: Tensor, reverse: bool) -> Tensor:
        """The chunks of `block`, from entering states `h` and adjoints `q` of their last states; overwrites
        both.

        Returns the adjoint of the entering states. Keeps the decays and the decayed states of the block's
        steps, (size, rows of the block, groups, d_state, channels) each.
        """
        rows = self.rows
        if self.kept is None:  # the first block is the largest
            self.kept = h.new_empty(2, rows.size, *h.shape)
        decays, decayed = self.kept[:, :, : h.shape[0]]
        dt, x, dy = rows.dt[block].unbind(1), rows.x[block].unbind(1), self.dy[block].unbind(1)
        B, C = rows.B[block].unsqueeze(-1).unbind(1), rows.C[block].unsqueeze(-1).unbind(1)
        dB, dC = self.dB[block].unsqueeze(-1).unbind(1), self.dC[block].unsqueeze(-1).unbind(1)
        dx, ddt, y = self.dx[block].unbind(1), self.ddt[block].unbind(1), self.y[block].unbind(1)
        order = rows.order(reverse)
        for t in order:
            decay, through = decays[t], decayed[t]
            torch.mul(dt[t], rows.A_log2, out=decay).exp2_()
            torch.mul(h, decay, out=through)
            torch.addcmul(through, B[t], x[t], out=h)
            dC[t].copy_(torch.matmul(h, dy[t].transpose(-1, -2)))
            if self.with_y:
                y[t].copy_(torch.matmul(C[t].transpose(-1, -2), h))
        dA = torch.zeros_like(h)
        ones = h.new_ones(1, h.shape[-2])  # a sum over d_state as a product is faster than `sum`
        for t in reversed(order):
            q.addcmul_(C[t], dy[t])  # the adjoint g_t of h_t
            dB[t].copy_(torch.matmul(q, x[t].transpose(-1, -2)))
            dx[t].copy_(torch.matmul(B[t].transpose(-1, -2), q))
            through = decayed[t].mul_(q)  # the adjoint of the decay's exponent
            dA.addcmul_(through, dt[t])
            ddt[t].copy_(torch.matmul(ones, through.mul_(rows.A)))
            q.mul_(decays[t])
        self.dA += dA.sum(0)
        return q

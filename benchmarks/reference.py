"""Checks of the selective scan against fp64 on slices of the very problem that is timed.

Channels meet only in the gradients of B and C. So a few channels over the whole length, taken through the
torch form in fp64 (which the tests hold against the plain loop), check outputs and the other six gradients of
a problem of any size. At step t the gradient of B rests on what comes after t alone, and that of C on what
came before: the last steps of the scan check dB and the first ones dC, over all channels, at the cost of a
short scan from a zero state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Check, relative_error
from benchmarks.inputs import ScanInputs
from ssm_modal.kernels.scan import selective_scan
from ssm_modal.kernels.sequences import Sequences

# ||value - reference|| / ||reference||, as tests/tolerances.py and the issue have them.
OUTPUT = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRADIENT = {torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 3e-3}

# Gradients that belong to a channel, with where they stand among the eight and the axis of the channels.
OF_CHANNELS = (
    ("du", 0, -1),
    ("ddelta", 1, -1),
    ("dA", 2, 0),
    ("dD", 5, 0),
    ("dz", 6, -1),
    ("ddelta_bias", 7, 0),
)
CHANNELS, STEPS, ROWS = 8, 64, 4
# States of the channels that a reference goes through, about a second of an H200's time in fp64.
STATES = 1 << 26


def spread(total: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of 0 .. total - 1, first and last among them, as indices."""
    return torch.linspace(0, total - 1, min(total, most), device=device, dtype=torch.float64).round().long()


@dataclass(frozen=True)
class ScanReference:
    """What the scan of `x` must give on slices; made once and held against every candidate.

    out: (batch, length, channels). gradients: by name, of the same channels. ends: dB and dC by name, with
    the rows and steps they hold, (rows, steps, d_state).
    """

    dtype: torch.dtype
    channels: Tensor
    out: Tensor
    gradients: dict[str, Tensor]
    ends: dict[str, tuple[Tensor, slice, Tensor]]

    def checks(self, result: object) -> list[Check]:
        """`result`: the output (batch, length, d_inner) alone, or with the eight gradients after it, dB and
        dC as (batch, length, d_state)."""
        found: tuple[Tensor, ...] = (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]
        limit, of_gradients = OUTPUT[self.dtype], GRADIENT[self.dtype]
        checks = [Check("out", relative_error(found[0][..., self.channels], self.out), limit)]
        if len(found) == 1:
            return checks
        for name, at, axis in OF_CHANNELS:
            value = found[1 + at].index_select(axis, self.channels)
            checks.append(Check(name, relative_error(value, self.gradients[name]), of_gradients))
        for name, (rows, steps, right) in self.ends.items():
            value = found[1 + {"dB": 3, "dC": 4}[name]][rows, steps]
            checks.append(Check(name, relative_error(value, right), of_gradients))
        return checks


def scan_reference(
    x: ScanInputs,
    *,
    reverse: bool = False,
    seqs: Sequences | None = None,
    channels: Tensor | None = None,
    gradients: bool = True,
) -> ScanReference:
    """The reference of `x` on `channels` (some, spread over all), and at the ends where B, C are (batch,
    length, d_state)."""
    device = x.u.device
    if channels is None:
        batch, length, d_inner = x.u.shape
        fit = STATES // max(1, batch * length * x.A.shape[1])
        channels = spread(d_inner, max(2, min(CHANNELS, fit)), device)
    some = channel_slice(x, channels)
    leaves = some.leaves()
    with torch.set_grad_enabled(gradients):
        out = run_scan(leaves, reverse=reverse, cu_seqlens=seqs, backend="torch")
    found: dict[str, Tensor] = {}
    ends: dict[str, tuple[Tensor, slice, Tensor]] = {}
    if gradients:
        all_of_them = torch.autograd.grad(out, leaves, some.dout)
        found = {name: all_of_them[at] for name, at, _ in OF_CHANNELS}
        lengths = (x.u.shape[1],) if seqs is None else seqs.lengths
        ends = _ends(x, reverse, lengths)
    return ScanReference(x.u.dtype, channels, out.detach(), found, ends)


def channel_slice(x: ScanInputs, channels: Tensor) -> ScanInputs:
    """The inputs of some channels alone, in fp64."""
    return ScanInputs(
        u=x.u[..., channels].double(),
        delta=x.delta[..., channels].double(),
        A=x.A[channels].double(),
        B=x.B.double(),
        C=x.C.double(),
        D=x.D[channels].double(),
        z=x.z[..., channels].double(),
        delta_bias=x.delta_bias[channels].double(),
        dout=x.dout[..., channels].double(),
    )


def run_scan(
    given: Sequence[Tensor],
    *,
    reverse: bool = False,
    cu_seqlens: Sequences | None = None,
    backend: str | None = None,
) -> Tensor:
    """The op on (u, delta, A, B, C, D, z, delta_bias), with softplus."""
    u, delta, A, B, C, D, z, bias = given
    return selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=bias,
        delta_softplus=True,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


def train_scan(
    given: Sequence[Tensor],
    dout: Tensor,
    scan: Callable[[Sequence[Tensor]], Tensor],
) -> tuple[Tensor, ...]:
    """The output of `scan` and its gradients to `given`, all alive."""
    out = scan(given)
    return (out.detach(), *torch.autograd.grad(out, given, dout))


def _ends(x: ScanInputs, reverse: bool, lengths: Sequence[int]) -> dict[str, tuple[Tensor, slice, Tensor]]:
    """dB over the last steps of the scan and dC over the first, inside one sequence, of all channels."""
    total = x.u.shape[1]
    low, high = slice(0, min(STEPS, lengths[0])), slice(total - min(STEPS, lengths[-1]), total)
    rows = spread(x.u.shape[0], ROWS, x.u.device)
    ends = {}
    for name, at, steps in (("dB", 3, low if reverse else high), ("dC", 4, high if reverse else low)):
        if steps.start == steps.stop:
            continue
        leaves = tuple(
            (t[:, steps][rows] if t.ndim > 2 else t).detach().double().requires_grad_() for t in x.given
        )
        out = run_scan(leaves, reverse=reverse, backend="torch")
        right = torch.autograd.grad(out, leaves[at], x.dout[:, steps][rows].double())[0]
        ends[name] = (rows, steps, right)
    return ends

"""The scan's modes against its plain forward: reverse, both directions, packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bar, Check, Options, Report, case, relative_error
from benchmarks.inputs import ScanInputs, scan_inputs
from benchmarks.reference import (
    CHANNELS,
    GRADIENT,
    OUTPUT,
    channel_slice,
    run_scan,
    scan_reference,
    spread,
    train_scan,
)
from benchmarks.scan import FORWARD, TRAINING
from benchmarks.timing import Candidate, measure
from ssm_modal.kernels.scan import ScanDirection, bidirectional_scan
from ssm_modal.kernels.sequences import Sequences

SEQUENCES = 64


def _runs(
    given: Sequence[Tensor], dout: Tensor, scan: Callable[[Sequence[Tensor]], Tensor], training: bool
) -> Callable[[], object]:
    def run() -> object:
        if training:
            return train_scan(given, dout, scan)
        with torch.no_grad():
            return scan(given)

    return run


@case(quick=True, seconds=5.0)
def reverse(options: Options) -> Report:
    """Selective scan in reverse beside forward, B8 D2048 L8192 N16 bf16: at most 3 % slower."""
    options.need()
    x = scan_inputs(*options.shrink(8, 2048, 8192, 16), device=options.device, dtype=torch.bfloat16)
    bars = options.bars(Bar(FORWARD, 1.03, "in time's order"), Bar(TRAINING, 1.03, "in time's order"))
    report = Report("reverse", x.shape, "reverse", bars=bars)
    backend = options.backend("selective_scan")
    ways = {
        "reverse": (scan_reference(x, reverse=True), lambda g: run_scan(g, reverse=True, backend=backend)),
        "in time's order": (scan_reference(x), lambda g: run_scan(g, backend=backend)),
    }
    _compare(report, x, options, ways)
    return report


def _compare(report: Report, x: ScanInputs, options: Options, ways: dict) -> None:
    """Forward and forward + backward of each of `ways`: name to (reference, scan)."""
    leaves = x.leaves()
    for what in (FORWARD, TRAINING):
        made = [
            Candidate(name, _runs(leaves, x.dout, scan, what == TRAINING), reference.checks)
            for name, (reference, scan) in ways.items()
        ]
        measure(report, what, made, options, options.device)


def unequal_lengths(total: int, count: int) -> tuple[int, ...]:
    """`count` lengths, very unequal and each at least 1, that sum to `total`; the same every time."""
    make = torch.Generator().manual_seed(1)
    weight = torch.rand(count, generator=make, dtype=torch.float64) ** 2 + 0.01
    lengths = (weight / weight.sum() * (total - count)).floor().long() + 1
    lengths[-1] += total - int(lengths.sum())
    return tuple(lengths.tolist())


@case(quick=True, seconds=6.0)
def packed(options: Options) -> Report:
    """64 packed sequences of unequal length beside one as long, B1 D2048 L131072: at most 5 % slower."""
    options.need()
    x = scan_inputs(*options.shrink(1, 2048, 131072, 16), device=options.device, dtype=torch.bfloat16)
    total = x.u.shape[1]
    lengths = unequal_lengths(total, min(SEQUENCES, max(1, total // 8)))
    seqs = Sequences.from_lengths(lengths, options.device)
    one = "one sequence"
    bars = options.bars(Bar(FORWARD, 1.05, one), Bar(TRAINING, 1.05, one))
    report = Report("packed", f"{x.shape}, {seqs.n} sequences", "packed", bars=bars)
    report.notes.append(f"lengths from {min(lengths):,} to {max(lengths):,}")
    backend = options.backend("selective_scan")
    ways = {
        "packed": (scan_reference(x, seqs=seqs), lambda g: run_scan(g, cu_seqlens=seqs, backend=backend)),
        one: (scan_reference(x), lambda g: run_scan(g, backend=backend)),
    }
    _compare(report, x, options, ways)
    return report


def two_directions(given: Sequence[Tensor], backend: str | None, flips: bool = False) -> Tensor:
    """The sum of a forward and a reverse scan of one u and one z, all else each direction's own.

    given: u, delta, A, B, C, D, z, delta_bias, then the other direction's delta, A, B, C, D, delta_bias.
    flips: the other direction as a forward scan of flipped inputs, its output flipped back.
    """
    u, z = given[0], given[6]
    delta, A, B, C, D, bias = given[8:]
    if not flips:
        return bidirectional_scan(
            u,
            ScanDirection(*given[1:6], given[7]),
            ScanDirection(delta, A, B, C, D, bias),
            z=z,
            delta_softplus=True,
            backend=backend,
        )
    ahead = run_scan(given[:8], backend=backend)
    turned = (u.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D, z.flip(1), bias)
    return ahead + run_scan(turned, backend=backend).flip(1)


def _both_inputs(x: ScanInputs) -> tuple[Tensor, ...]:
    """`given` of `two_directions`: the other direction's own, made from x by rolling."""
    own = (x.delta.roll(1, 2), 1.5 * x.A, x.B.roll(1, 2), x.C.roll(2, 2), 0.5 * x.D, x.delta_bias.roll(1))
    return (*x.given, *own)


@case(quick=True, seconds=6.0)
def bidirectional(options: Options) -> Report:
    """Both directions in one op, own parameters each, beside flips, B8 D2048 L8192: 1.3 times faster."""
    options.need()
    x = scan_inputs(*options.shrink(8, 2048, 8192, 16), device=options.device, dtype=torch.bfloat16)
    flips = "two forward scans with flips"
    bars = options.bars(Bar(FORWARD, 1 / 1.3, flips), Bar(TRAINING, 1 / 1.3, flips))
    report = Report("bidirectional", x.shape, "both at once", bars=bars)
    given = tuple(t.detach().requires_grad_() for t in _both_inputs(x))
    verify = _check_both(x, given)
    backend = options.backend("selective_scan")
    ways = {
        report.ours: partial(two_directions, backend=backend),
        flips: partial(two_directions, backend=backend, flips=True),
    }
    for what in (FORWARD, TRAINING):
        made = [
            Candidate(name, _runs(given, x.dout, scan, what == TRAINING), verify)
            for name, scan in ways.items()
        ]
        measure(report, what, made, options, options.device)
    return report


def _check_both(x: ScanInputs, given: Sequence[Tensor]) -> Callable[[object], list[Check]]:
    """Output and the gradients of what belongs to a channel, on some channels, in fp64."""
    channels = spread(x.u.shape[2], CHANNELS, x.u.device)
    first = channel_slice(x, channels)
    other = channel_slice(
        replace(x, delta=given[8], A=given[9], B=given[10], C=given[11], D=given[12], delta_bias=given[13]),
        channels,
    )
    own = (other.delta, other.A, other.B, other.C, other.D, other.delta_bias)
    leaves = tuple(t.detach().requires_grad_() for t in (*first.given, *own))
    right = train_scan(leaves, first.dout, lambda g: two_directions(g, "torch"))
    axes = {"du": (0, -1), "ddelta": (1, -1), "dA": (2, 0), "dz": (6, -1), "ddelta'": (8, -1), "dA'": (9, 0)}

    def verify(result: object) -> list[Check]:
        found: tuple[Tensor, ...] = (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]
        dtype = x.u.dtype
        # The sum of two rounded outputs is rounded once more.
        checks = [Check("out", relative_error(found[0][..., channels], right[0]), 2 * OUTPUT[dtype])]
        if len(found) > 1:
            for name, (at, axis) in axes.items():
                value = found[1 + at].index_select(axis, channels)
                checks.append(Check(name, relative_error(value, right[1 + at]), 2 * GRADIENT[dtype]))
        return checks

    return verify

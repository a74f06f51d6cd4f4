"""The selective scan at the shapes of the issue: forward, forward + backward, and peak memory, beside peers.

u, delta, z, B, C bf16; A, D, bias fp32; softplus and gate on; gradients to all eight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Bar, Check, Options, Report, add_case, case
from benchmarks.inputs import ScanInputs, scan_inputs
from benchmarks.reference import ScanReference, run_scan, scan_reference, train_scan
from benchmarks.timing import Candidate, measure, peak_of

OURS = "ssm_modal"
FORWARD, TRAINING = "forward", "forward + backward"


@dataclass(frozen=True)
class ScanCase:
    """A shape and what the issue asks of it, in ms and GiB (peak of forward + backward)."""

    batch: int
    d_inner: int
    length: int
    d_state: int
    forward: float
    training: float
    memory: float
    quick: bool = False

    @property
    def name(self) -> str:
        states = "" if self.d_state == 16 else f"_n{self.d_state}"
        return f"scan_b{self.batch}_l{self.length}{states}"

    def inputs(self, options: Options) -> ScanInputs:
        sizes = options.shrink(self.batch, self.d_inner, self.length, self.d_state)
        return scan_inputs(*sizes, device=options.device, dtype=torch.bfloat16)


SCANS = (
    ScanCase(8, 2048, 2048, 16, forward=0.40, training=1.46, memory=0.85, quick=True),
    ScanCase(8, 2048, 8192, 16, forward=1.6, training=5.9, memory=2.55, quick=True),
    ScanCase(64, 1024, 1024, 16, forward=0.75, training=2.8, memory=1.43, quick=True),
    ScanCase(1, 2048, 131072, 16, forward=3.2, training=12.0, memory=4.83, quick=True),
    ScanCase(1, 1024, 1048576, 16, forward=12.8, training=48.0, memory=18.59),
    ScanCase(8, 2048, 8192, 64, forward=5.9, training=23.0, memory=2.63),
)


def candidates(
    x: ScanInputs, reference: ScanReference, options: Options, notes: list[str], training: bool
) -> Iterator[Candidate]:
    """Ours, mamba_ssm and mambapy on `x`, each made when it is its turn."""
    leaves = x.leaves()
    backend = options.backend("selective_scan")

    def both(scan: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            if training:
                return train_scan(leaves, x.dout, scan)
            with torch.no_grad():
                return scan(leaves)

        return run

    def holds() -> tuple[Tensor, ...]:
        return (*x.given, x.dout) if training else x.given

    yield Candidate(OURS, both(lambda given: run_scan(given, backend=backend)), reference.checks, holds)

    def mamba_ssm() -> Candidate:
        other = peers.MambaSsmScan(x)

        def forward() -> Tensor:
            with torch.no_grad():
                return other.forward()

        def verify(result: object) -> list[Check]:
            return reference.checks(peers.turned(result))

        held = other.holds if training else lambda: other.given
        return Candidate(peers.MAMBA_SSM, other.train if training else forward, verify, held)

    yield from peers.offer(notes, peers.MAMBA_SSM, mamba_ssm)

    def mambapy() -> Candidate:
        peers.peer("mambapy.pscan", "pscan")
        return Candidate(peers.MAMBAPY, both(peers.mambapy_scan), reference.checks, holds, slow=True)

    yield from peers.offer(notes, peers.MAMBAPY, mambapy)


def compare(report: Report, x: ScanInputs, options: Options) -> None:
    """Fill `report` with `x` forward, and forward + backward with its peak memory, beside every peer."""
    reference = scan_reference(x)
    ahead = candidates(x, reference, options, report.notes, training=False)
    measure(report, FORWARD, ahead, options, options.device)
    # What keeps a peer out is the same for both comparisons: it is noted once.
    both = candidates(x, reference, options, [], training=True)
    measure(report, TRAINING, both, options, options.device, memory=True)


def _case(shape: ScanCase) -> Callable[[Options], Report]:
    def run(options: Options) -> Report:
        options.need()
        x = shape.inputs(options)
        bars = options.bars(
            Bar(FORWARD, shape.forward),
            Bar(TRAINING, shape.training),
            Bar(peak_of(TRAINING), shape.memory),
        )
        report = Report(shape.name, x.shape, OURS, bars=bars)
        compare(report, x, options)
        return report

    run.__doc__ = (
        f"Selective scan, B{shape.batch} D{shape.d_inner} L{shape.length} N{shape.d_state} bf16, forward and "
        "forward + backward."
    )
    return run


for _shape in SCANS:
    add_case(_shape.name, _case(_shape), on="cuda", quick=_shape.quick, seconds=8.0)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic mode, without its filling of new tensors, which is a debugging aid."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    aid: Any = torch.utils.deterministic
    filled = aid.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    aid.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        aid.fill_uninitialized_memory = filled


def in_deterministic_mode(candidate: Candidate) -> Candidate:
    """`candidate` run in torch's deterministic mode."""

    def run() -> object:
        with deterministic():
            return candidate.run()

    return replace(candidate, name=f"{candidate.name}, deterministic", run=run)


def _training(x: ScanInputs, options: Options, notes: list[str]) -> Iterator[Candidate]:
    """Forward + backward: ours, ours in deterministic mode, the peers."""
    made = candidates(x, scan_reference(x), options, notes, training=True)
    ours = next(made)
    yield ours
    yield in_deterministic_mode(ours)
    yield from made


@case(seconds=12.0, whole=False)
def memory(options: Options) -> Iterator[Report]:
    """Peak memory of the scan, forward + backward, inputs, outputs and all gradients alive, at each shape."""
    options.need()
    for shape in SCANS:
        x = shape.inputs(options)
        bars = options.bars(Bar(peak_of(TRAINING), shape.memory))
        report = Report("memory", x.shape, OURS, bars=bars)
        made = _training(x, options, report.notes)
        measure(report, TRAINING, made, options, options.device, memory=True, times=False)
        yield report


@case(seconds=5.0)
def deterministic_scan(options: Options) -> Report:
    """Selective scan, forward + backward, in torch's deterministic mode beside the plain one."""
    options.need()
    x = SCANS[1].inputs(options)
    report = Report("deterministic_scan", x.shape, OURS)
    made = itertools.islice(_training(x, options, report.notes), 2)
    measure(report, TRAINING, made, options, options.device, memory=True)
    return report

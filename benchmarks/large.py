"""2^32 elements: offsets beyond 32 bits, forward and backward, checked on slices of the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.harness import Options, Report, case
from benchmarks.inputs import ScanInputs, scan_inputs
from benchmarks.reference import run_scan, scan_reference, train_scan
from benchmarks.scan import OURS, TRAINING
from benchmarks.timing import Candidate, free, measure

SHAPE = (1, 4096, 1 << 20, 16)


def strided(x: ScanInputs) -> ScanInputs:
    """The same values as views: u and z side by side in one tensor, B and C in another with room before them,
    as a layer's projections give them."""
    batch, length, d_inner = x.u.shape
    d_state = x.A.shape[1]
    joint = torch.empty(batch, length, 2 * d_inner, device=x.u.device, dtype=x.u.dtype)
    projected = torch.empty(batch, length, 64 + 2 * d_state, device=x.u.device, dtype=x.u.dtype)
    u, z = joint.chunk(2, dim=-1)
    _, B, C = projected.split([64, d_state, d_state], dim=-1)
    u.copy_(x.u), z.copy_(x.z), B.copy_(x.B), C.copy_(x.C)
    return replace(x, u=u, z=z, B=B, C=C)


@case(seconds=25.0)
def large(options: Options) -> Iterator[Report]:
    """Selective scan of 2^32 elements, B1 D4096 L1048576 N16 bf16, forward + backward, also through views."""
    options.need()
    backend = options.backend("selective_scan")
    few = replace(options, repeats=min(options.repeats, 3))
    for views in (False, True):
        x = scan_inputs(*options.shrink(*SHAPE), device=options.device, dtype=torch.bfloat16)
        if views:
            x = strided(x)
        said = "strided views" if views else "contiguous"
        report = Report("large", f"{x.shape}, {x.u.numel():,} elements, {said}", OURS)
        reference = scan_reference(x)
        leaves = x.leaves()

        def run(x: ScanInputs = x, leaves: tuple = leaves) -> object:
            return train_scan(leaves, x.dout, lambda given: run_scan(given, backend=backend))

        def holds(x: ScanInputs = x) -> tuple:
            return (*x.given, x.dout)

        ours = Candidate(OURS, run, reference.checks, holds)
        measure(report, TRAINING, [ours], few, options.device, memory=True)
        del x, reference, leaves, run, holds, ours
        free(options.device)
        yield report

"""Time and peak memory of forward + backward against length, beside every peer that can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.block import DTYPE, attention_way, layer_ways, mamba_layer
from benchmarks.harness import Options, Report, case
from benchmarks.inputs import scan_inputs
from benchmarks.reference import scan_reference
from benchmarks.scan import OURS, TRAINING, candidates
from benchmarks.timing import measure

SCAN_LENGTHS = tuple(1 << k for k in range(10, 21))
BLOCK_LENGTHS = tuple(1 << k for k in range(10, 21))
# Attention's time grows with the square of the length: beyond this it would take the run's whole time.
ATTENTION_TO = 1 << 17


def _fewer(options: Options) -> Options:
    """Fewer rounds than a single shape takes: a curve shows itself that a point is off."""
    return replace(options, repeats=min(options.repeats, 7), seconds=min(options.seconds, 3.0))


def _lengths(options: Options, lengths: tuple[int, ...]) -> tuple[int, ...]:
    if options.tiny:
        return 8, 16, 32
    return lengths[::2] if options.quick else lengths


@case(seconds=25.0)
def lengths_scan(options: Options) -> Iterator[Report]:
    """Selective scan, B1 D1024 N16 bf16: time and peak memory of forward + backward to a length of 2^20."""
    options.need()
    for length in _lengths(options, SCAN_LENGTHS):
        sizes = options.shrink(1, 1024, length, 16)
        x = scan_inputs(*sizes, device=options.device, dtype=torch.bfloat16)
        report = Report("lengths_scan", x.shape, OURS, length=sizes[2])
        made = candidates(x, scan_reference(x), options, report.notes, training=True)
        measure(report, TRAINING, made, _fewer(options), options.device, memory=True)
        yield report


@case(seconds=25.0)
def lengths_block(options: Options) -> Iterator[Report]:
    """Mamba(1024) bf16, B1: time and peak memory of forward + backward against length, beside attention."""
    options.need()
    d_model = 16 if options.tiny else 1024
    ours = mamba_layer(d_model, options)
    make = torch.Generator(options.device).manual_seed(0)
    for length in _lengths(options, BLOCK_LENGTHS):
        x = torch.randn(1, length, d_model, generator=make, device=options.device, dtype=DTYPE)
        report = Report("lengths_block", f"B1 L{length} d{d_model} bf16", OURS, length=length)

        def ways(x: torch.Tensor = x, report: Report = report) -> Iterator:
            yield from layer_ways(ours, x, options, report.notes, training=True, slow=False)
            if x.shape[1] <= ATTENTION_TO:
                yield attention_way(x, training=True)

        measure(report, TRAINING, ways(), _fewer(options), options.device, memory=True)
        yield report

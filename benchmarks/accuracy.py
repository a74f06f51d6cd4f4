"""Accuracy of the selective scan against fp64 on identically rounded inputs, over extremes of dt and A.

Every pair of a step size and a decay rate stands in channels of its own, and errors are taken pair by pair,
so that no large output hides a small one. The reference is the torch form in fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness import Check, Options, Report, case, relative_error
from benchmarks.inputs import ScanInputs, short
from benchmarks.reference import GRADIENT, OUTPUT, run_scan, train_scan
from benchmarks.scan import OURS

STEP_SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Of a channel's states: one rate for all, or, for None, spread between the extremes.
RATES = (-1e-3, -1.0, -64.0, None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (batch, length, channels a pair, groups of B and C): odd lengths; at 2^20 few channels.
PROBLEMS = ((2, 1001, 8, 1), (1, 65537, 4, 4), (1, 1 << 20, 1, 1))
D_STATE = 16


@dataclass(frozen=True)
class Pairs:
    """Inputs whose channels are `each` for every (step size, rate), in the order of `labels`."""

    x: ScanInputs
    labels: tuple[tuple[float, float | None], ...]
    each: int

    def channels(self, at: int) -> slice:
        return slice(at * self.each, (at + 1) * self.each)


def pairs(
    batch: int,
    length: int,
    each: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
    d_state: int = D_STATE,
) -> Pairs:
    """Random inputs, dt within a factor of about 2 of its step size. B, C: (batch, length, groups, d_state),
    or without that axis for one group.

    Where steps are large so are states and gradients: the output's gradient is scaled down there, to stay
    inside fp16.
    """
    make = torch.Generator(device).manual_seed(0)
    labels = tuple(itertools.product(STEP_SIZES, RATES))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device)

    rates = torch.stack(
        [
            -torch.logspace(-3, 1.80617997, d_state)  # to 64
            if rate is None
            else torch.full((d_state,), rate)
            for _, rate in labels
        ]
    )
    steps = torch.tensor([step for step, _ in labels], dtype=torch.float64)
    bias = torch.log(torch.expm1(steps)).float()
    wide = len(labels) * each
    bc = (batch, length, d_state) if groups == 1 else (batch, length, groups, d_state)
    scale = torch.clamp(1 / steps, max=1.0).float().repeat_interleave(each).to(device)
    x = ScanInputs(
        u=normal(batch, length, wide).to(dtype),
        delta=(0.3 * normal(batch, length, wide)).to(dtype),
        A=rates.repeat_interleave(each, 0).to(device),
        B=normal(*bc).to(dtype),
        C=normal(*bc).to(dtype),
        D=0.1 * normal(wide),
        z=normal(batch, length, wide).to(dtype),
        delta_bias=bias.repeat_interleave(each).to(device),
        dout=(normal(batch, length, wide) * scale).to(dtype),
    )
    return Pairs(x, labels, each)


def checks(problem: Pairs, options: Options) -> list[Check]:
    """The worst pair of each result: outputs and their channels' gradients pair by pair, sums over time step
    size by step size, dB and dC as a whole."""
    x = problem.x
    backend = options.backend("selective_scan")
    wide = replace(x, **{name: getattr(x, name).double() for name in x.__dataclass_fields__})
    right = train_scan(wide.leaves(), wide.dout, lambda given: run_scan(given, backend="torch"))
    del wide
    found = train_scan(x.leaves(), x.dout, lambda given: run_scan(given, backend=backend))
    names = ("out", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias")
    results = []
    for name, value, reference in zip(names, found, right):
        errors = {
            label: relative_error(value[part], reference[part]) for label, part in _parts(name, problem)
        }
        worst = max(errors, key=lambda label: errors[label])
        limit = (OUTPUT if name == "out" else GRADIENT)[x.u.dtype]
        results.append(Check(f"{name}{worst}", errors[worst], limit))
    return results


def _parts(name: str, problem: Pairs) -> Iterator[tuple[str, tuple]]:
    if name in ("dB", "dC"):
        yield "", (...,)
        return
    if name in ("dA", "dD", "ddelta_bias"):
        # One number a channel: a pair may be nothing but zeros (a state that forgets at once has no dA).
        together = len(RATES) * problem.each
        for i, step in enumerate(STEP_SIZES):
            yield f" at dt {step:g}", (slice(i * together, (i + 1) * together),)
        return
    for i, (step, rate) in enumerate(problem.labels):
        said = "mixed" if rate is None else f"{rate:g}"
        yield f" at dt {step:g}, A {said}", (..., problem.channels(i))


@case(seconds=25.0)
def accuracy(options: Options) -> Iterator[Report]:
    """Errors against fp64, fp32, bf16 and fp16, dt from 1e-4 to 10, A from -1e-3 to -64, lengths to 2^20."""
    options.need()
    for batch, length, each, groups in PROBLEMS[:2] if options.quick else PROBLEMS:
        batch, _, length = options.shrink(batch, 0, length)
        for dtype in DTYPES:
            problem = pairs(
                batch, length, each, groups, dtype, options.device, 4 if options.tiny else D_STATE
            )
            x = problem.x
            shape = (
                f"{x.shape[: x.shape.rindex(' ')]} {short(dtype)}, {len(problem.labels)} pairs of dt and A"
            )
            if groups > 1:
                shape += f", {groups} groups"
            report = Report("accuracy", shape, OURS)
            report.checks = checks(problem, options)
            del problem, x
            yield report

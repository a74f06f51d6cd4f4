"""Launches of the Triton selective scan on one NVIDIA GPU: the shipped one, and others beside it.

    python -m benchmarks.bench_scan --only L8192
    python -m benchmarks.bench_scan --only "L8192 N16" --sweep
    python -m benchmarks.bench_scan --only "L8192 N16" --sweep fwd_registers=96,128 bwd_steps=4,8

The kernels alone (`selective_scan_fwd`, `selective_scan_bwd`) are timed, by CUDA events, in turn. A bare
`--sweep` varies every field of the launch, one at a time; `FIELD=V,V` tries those values, all combinations of
several fields. A launch that does not compile, or whose results are wrong on a small problem, has no times.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Check, Options, Report, Unavailable
from benchmarks.inputs import ScanInputs, scan_inputs
from benchmarks.output import report_lines
from benchmarks.reference import ScanReference, scan_reference
from benchmarks.scan import FORWARD, TRAINING
from benchmarks.timing import Candidate, free, measure
from ssm_modal.kernels.scan.launch import scan_launch

# (batch, d_inner, length, d_state).
SHAPES = (
    (8, 2048, 2048, 16),
    (8, 2048, 8192, 16),
    (64, 1024, 1024, 16),
    (1, 2048, 131072, 16),
    (1, 1024, 1048576, 16),
    (8, 2048, 8192, 64),
    (1, 4096, 1048576, 16),
)
SMALL = (2, 96, 700)  # batch, d_inner, length of the problem that every launch is checked on
SHIPPED = "shipped"

Launch = Any  # a frozen dataclass of launch.py; which fields it has is that module's affair


def launch_of(x: ScanInputs) -> Launch:
    """The launch that the table gives for `x`."""
    batch, length, d_inner = x.u.shape
    return scan_launch(batch, length, d_inner, 1, x.A.shape[1], x.u.device)


def forward(x: ScanInputs, launch: Launch) -> tuple[Tensor, Tensor]:
    """The output, and the states saved for the backward."""
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    arguments: Any = (*_arguments(x), True, None, None, False)
    out, _, states = selective_scan_fwd(*arguments, launch=launch)
    return out, states


def training(x: ScanInputs, launch: Launch) -> tuple[Tensor, ...]:
    """The output and the gradients of the eight inputs."""
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd

    out, states = forward(x, launch)
    arguments: Any = (x.dout, None, *_arguments(x), True, None, None, False, states)
    grads: Any = selective_scan_bwd(*arguments, launch=launch)
    return out, *(_alone(g) for g in grads[:8])


def _arguments(x: ScanInputs) -> tuple[Tensor, ...]:
    """The eight inputs, B and C with an axis of one group."""
    return tuple(t.unsqueeze(2) if t is x.B or t is x.C else t for t in x.given)


def _alone(t: Tensor) -> Tensor:
    return t.squeeze(2) if t.ndim == 4 else t


def parse_sweep(words: Sequence[str], shipped: Launch) -> dict[str, list[object]]:
    """`FIELD=V,V` words as candidates by field: numbers, True, False or None.

    Raises ValueError for a field that the launch has not, naming those it has, and for no value.
    """
    fields = [field.name for field in dataclasses.fields(shipped)]
    found: dict[str, list[object]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in fields:
            raise ValueError(f"--sweep {word!r}: a launch has no field {name!r}; it has {', '.join(fields)}")
        try:
            found[name] = [ast.literal_eval(value) for value in values.split(",")]
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"--sweep {word!r}: expected {name}=V,V with numbers, True, False or None"
            ) from error
    return found


def variants(shipped: Launch, given: dict[str, list[object]]) -> Iterator[tuple[str, Launch]]:
    """Launches beside the shipped one, by name: all combinations of `given`, or, without, each field doubled,
    halved or turned over alone."""
    if given:
        for values in itertools.product(*given.values()):
            changes = dict(zip(given, values))
            variant = dataclasses.replace(shipped, **changes)
            if variant != shipped:
                yield " ".join(f"{name}={value}" for name, value in changes.items()), variant
        return
    for field in dataclasses.fields(shipped):
        value = getattr(shipped, field.name)
        for other in _neighbours(value):
            yield f"{field.name}={other}", dataclasses.replace(shipped, **{field.name: other})


def _neighbours(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [n for n in (value // 2, 2 * value) if n > 0]
    return []


@dataclass(frozen=True)
class Small:
    """The problem that every launch is checked on, with its fp64 reference; one for each d_state."""

    x: ScanInputs
    reference: ScanReference

    @classmethod
    def of(cls, d_state: int, options: Options) -> Small:
        batch, d_inner, length, d_state = options.shrink(*SMALL, d_state)
        x = scan_inputs(batch, d_inner, length, d_state, device=options.device, dtype=torch.bfloat16)
        return cls(x, scan_reference(x))

    def checks(self, launch: Launch, result: object = None) -> list[Check]:
        """Of `launch` on the small problem, whatever its `result` on the timed one."""
        return self.reference.checks(training(self.x, launch))


def compare(
    shape: Sequence[int], words: Sequence[str] | None, options: Options, only_backward: bool = False
) -> Report:
    """The shipped launch at `shape`, and with `words` others, forward and forward + backward."""
    x = scan_inputs(*options.shrink(*shape), device=options.device, dtype=torch.bfloat16)
    shipped = launch_of(x)
    small = Small.of(shape[3], options)
    launches = {SHIPPED: shipped}
    if words is not None:
        launches |= dict(variants(shipped, parse_sweep(words, shipped)))
    report = Report("bench_scan", x.shape, SHIPPED)
    report.notes.append(f"shipped: {shipped}")

    def ways(run: Callable[[ScanInputs, Launch], object], gradients: bool) -> Iterator[Candidate]:
        def held() -> tuple[Tensor, ...]:
            return (*x.given, x.dout) if gradients else x.given

        for name, launch in launches.items():
            yield Candidate(name, partial(run, x, launch), partial(small.checks, launch), held)

    if not only_backward:
        measure(report, FORWARD, ways(forward, False), options, options.device)
    measure(report, TRAINING, ways(training, True), options, options.device, memory=True)
    return report


def add_sweep_options(parser: argparse.ArgumentParser, repeats: int, seconds: float) -> None:
    """What every sweep of launches takes: which, how often, where. repeats, seconds: the defaults."""
    parser.add_argument(
        "--sweep",
        nargs="*",
        metavar="FIELD=V,V",
        help="time other launches too; bare: each field's neighbours",
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="rounds of a shape end after this long (%(default)s)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="cut every size to almost nothing: does it run?")


def sweep_options(args: argparse.Namespace) -> Options:
    """The harness's options of parsed `add_sweep_options`."""
    return Options(args.repeats, args.repeats, args.seconds, device=torch.device(args.device), tiny=args.tiny)


def main(argv: list[str] | None = None) -> int:
    """Check, then time; exit status 1 where a check of the shipped launch fails or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scan", description=main.__doc__)
    parser.add_argument("--only", default="", help="only shapes with this in their name, such as L8192")
    parser.add_argument("--backward", action="store_true", help="leave the forward alone out")
    add_sweep_options(parser, repeats=10, seconds=60.0)
    args = parser.parse_args(argv)
    options = sweep_options(args)
    try:
        options.need()
    except Unavailable as why:
        print(f"bench_scan cannot run: {why}", file=sys.stderr)
        return 1
    named = {"B{} D{} L{} N{}".format(*shape): shape for shape in SHAPES}
    shapes = [shape for name, shape in named.items() if args.only in name]
    if not shapes:
        parser.error(f"--only {args.only!r} is in no shape's name; there are {', '.join(named)}")
    fine = True
    for shape in shapes:
        try:
            report = compare(shape, args.sweep, options, args.backward)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(report_lines(report)) + "\n", flush=True)
        fine = fine and report.correct
        free(options.device)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

"""What every benchmark shares: cases, options, and reports whose times exist only behind passed checks.

A case is a function of `Options` that yields one `Report` or several: it checks what it times against a
reference in fp64, times it beside its peers (`timing.measure`), and names what is asked for (`Bar`).
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssm_modal.kernels.dispatch import SUPPORT, why_not

CUDA = torch.device("cuda")


class Unavailable(Exception):
    """A case, or a peer, that cannot run here; the text says why and what would mend it."""


@dataclass(frozen=True)
class Check:
    """One comparison: `error` = ||value - reference|| / ||reference||, allowed up to `limit`."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Figure:
    """What was measured of `who` for `what`: one sample a round, in `unit` (ms, us, s, GiB)."""

    what: str
    who: str
    samples: tuple[float, ...]
    unit: str = "ms"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the samples; of fewer than four, all of them."""
        if len(self.samples) < 4:
            return min(self.samples), max(self.samples)
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Bar:
    """The most that is asked for of our median of `what`: in its unit, or as a share of `beside`'s median."""

    what: str
    at_most: float
    beside: str | None = None


@dataclass
class Report:
    """What a case found. `ours` names this project's entry among the figures; at most one bar a `what`.

    `length`: the length measured, where the case is one of several along it. `rates`: units of work (such as
    tokens) one call of a `what` gets through, with their name.
    """

    case: str
    shape: str
    ours: str
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    bars: tuple[Bar, ...] = ()
    notes: list[str] = field(default_factory=list)
    length: int | None = None
    rates: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return all(check.passed for check in self.checks)

    def figure(self, what: str, who: str) -> Figure | None:
        return next((f for f in self.figures if (f.what, f.who) == (what, who)), None)

    def ratio(self, what: str, who: str) -> float:
        """How many times ours `who` took (or held), by medians; NaN where either is missing."""
        ours, theirs = self.figure(what, self.ours), self.figure(what, who)
        if ours is None or theirs is None or ours.median == 0:
            return math.nan
        return theirs.median / ours.median

    def bar(self, what: str) -> Bar | None:
        return next((bar for bar in self.bars if bar.what == what), None)

    def limit(self, bar: Bar) -> float | None:
        """`bar` in the unit of its figure; None where what it is a share of was not measured."""
        if bar.beside is None:
            return bar.at_most
        peer = self.figure(bar.what, bar.beside)
        return None if peer is None else bar.at_most * peer.median

    def met(self, bar: Bar) -> bool | None:
        """Whether `bar` is met; None where it cannot be told."""
        ours, limit = self.figure(bar.what, self.ours), self.limit(bar)
        return None if ours is None or limit is None else ours.median <= limit


@dataclass(frozen=True)
class Options:
    """What the command line asks of every case.

    repeats, slow_repeats: rounds timed of each candidate, of slow ones. seconds: rounds of one comparison
    end, after at least one, when all together have taken this long. device: where the cases named for a GPU
    run. tiny: every size cut to almost nothing and no bars, to see on any machine that a case runs.
    """

    repeats: int = 15
    slow_repeats: int = 3
    seconds: float = 6.0
    device: torch.device = CUDA
    tiny: bool = False
    quick: bool = False

    def need(self, op: str = "selective_scan", dtype: torch.dtype = torch.bfloat16) -> None:
        """Raise Unavailable where the cases for a GPU cannot run on `device`."""
        if self.device.type != "cuda":
            if not self.tiny:
                raise Unavailable(f"it is for an NVIDIA GPU, and the device asked for is {self.device}")
            return
        if not torch.cuda.is_available():
            raise Unavailable("it needs an NVIDIA GPU, and there is none")
        reason = why_not(op, "triton", self.device, dtype) if "triton" in SUPPORT[op] else None
        if reason is not None:
            raise Unavailable(reason)

    def backend(self, op: str) -> str | None:
        """Triton on a GPU, wherever `op` has it; elsewhere the op's own choice."""
        return "triton" if self.device.type == "cuda" and "triton" in SUPPORT[op] else None

    def shrink(self, *sizes: int) -> tuple[int, ...]:
        """`sizes` as they are; tiny, (batch, channels, length, states) become at most (2, 8, 40, 4)."""
        if not self.tiny:
            return sizes
        return tuple(min(size, most) for size, most in zip(sizes, (2, 8, 40, 4)))

    def bars(self, *bars: Bar) -> tuple[Bar, ...]:
        """`bars`, or none where sizes are tiny."""
        return () if self.tiny else bars


@dataclass(frozen=True)
class Case:
    """A named benchmark.

    on: "cuda" or "cpu". quick: part of `--quick`. seconds: about what it takes, so that a run with little of
    its budget left does not begin it. whole: part of a run without `--only`; a case that repeats what others
    measure is not.
    """

    name: str
    function: Callable[[Options], Report | Iterable[Report]]
    on: str
    quick: bool
    seconds: float
    whole: bool = True

    @property
    def about(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def run(self, options: Options) -> Iterator[Report]:
        found = self.function(options)
        yield from [found] if isinstance(found, Report) else found


CASES: dict[str, Case] = {}
Function = Callable[[Options], Report | Iterable[Report]]


def case(
    *, on: str = "cuda", quick: bool = False, seconds: float = 5.0, whole: bool = True
) -> Callable[[Function], Function]:
    """Register a function under its own name."""

    def register(function: Function) -> Function:
        add_case(function.__name__, function, on=on, quick=quick, seconds=seconds, whole=whole)
        return function

    return register


def add_case(
    name: str, function: Function, *, on: str, quick: bool, seconds: float, whole: bool = True
) -> None:
    """Register `function` under `name`."""
    if name in CASES:
        raise ValueError(f"there is a case {name!r} already")
    CASES[name] = Case(name, function, on, quick, seconds, whole)


def chosen(only: str | None, quick: bool = False) -> list[str]:
    """Names of the cases that `only` picks: names or beginnings of names joined by commas.

    A whole name picks that case alone. For None those of the whole run, or of the quick one.
    """
    if only is None:
        return [name for name, case in CASES.items() if (case.quick if quick else case.whole)]
    picked: list[str] = []
    for word in (word.strip() for word in only.split(",")):
        found = [word] if word in CASES else [name for name in CASES if name.startswith(word)]
        if not found or not word:
            raise ValueError(f"--only {word!r} picks no case; there are {', '.join(CASES)}")
        picked += [name for name in found if name not in picked]
    return picked


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64; infinite where value is not finite."""
    value, reference = value.detach().double(), reference.detach().double()
    if value.shape != reference.shape or not torch.isfinite(value).all():
        return math.inf
    size = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(value - reference)) / (size if size > 0 else 1.0)


@dataclass
class Outcome:
    """A whole run: reports in order, cases left out and why, cases that broke and how."""

    reports: list[Report] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        return [f"{r.case} ({r.shape})" for r in self.reports if not r.correct]

    def bars(self) -> Iterator[tuple[Report, Bar]]:
        """Every bar of a correct report."""
        for report in self.reports:
            if report.correct:
                for bar in report.bars:
                    yield report, bar

    def code(self, require_bars: bool) -> int:
        """0; 1 where a check failed or a case broke; with `require_bars`, 2 where a bar was missed."""
        if self.wrong or self.broken:
            return 1
        return 2 if require_bars and any(r.met(bar) is False for r, bar in self.bars()) else 0


def run(
    names: list[str],
    options: Options,
    budget: float | None = None,
    show: Callable[[Report], None] = lambda report: None,
) -> Outcome:
    """Run the named cases, handing each report to `show` as it comes.

    With a `budget` in seconds, cases that would probably end after it are left out and said to be. A case
    that raises is broken, and the next one runs.
    """
    outcome = Outcome()
    began = time.perf_counter()
    for name in names:
        case = CASES[name]
        left = None if budget is None else budget - (time.perf_counter() - began)
        if left is not None and left < case.seconds:
            outcome.skipped[name] = f"the run's {budget:g} seconds are spent; --only {name} runs it alone"
            continue
        try:
            for report in case.run(options):
                outcome.reports.append(report)
                show(report)
        except Unavailable as why:
            outcome.skipped[name] = str(why)
        except Exception as error:  # one broken case must not cost the others their figures
            traceback.print_exc()
            outcome.broken[name] = f"{type(error).__name__}: {error}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return outcome

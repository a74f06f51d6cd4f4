"""What every benchmark shares: checks first, then medians timed in turn, then ratios against bars.

A case is a function that checks its op against a reference and, only where every check passed, times it
beside its peers. Candidates are timed in turn, round after round: a machine that slows down slows all.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


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
class Timing:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Bar:
    """The least ratio of `peer`'s time to ours that is asked for."""

    peer: str
    ratio: float


@dataclass
class Report:
    """What a case found. `ours` names the candidate of `timings` that is this project's."""

    case: str
    shape: str
    ours: str
    checks: list[Check] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        return all(check.passed for check in self.checks)

    def ratio(self, peer: str) -> float:
        """How many times longer `peer` took than ours, by medians."""
        return self.timings[peer].median / self.timings[self.ours].median

    def met(self, bar: Bar) -> bool | None:
        """Whether `bar` is met; None where its peer was not timed."""
        return None if bar.peer not in self.timings else self.ratio(bar.peer) >= bar.ratio


@dataclass(frozen=True)
class Options:
    """What the command line asks of every case: rounds of ours, rounds of slow peers."""

    repeats: int = 15
    slow_repeats: int = 3


Case = Callable[[Options], Report]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register `function` under its own name."""
    CASES[function.__name__] = function
    return function


def chosen(only: str | None) -> list[str]:
    """Names of the cases that `only`, names or beginnings of names joined by commas, picks; all for None."""
    if only is None:
        return list(CASES)
    picked: list[str] = []
    for word in only.split(","):
        found = [name for name in CASES if name.startswith(word.strip())]
        if not found or not word.strip():
            raise ValueError(f"--only {word!r} picks no case; there are {', '.join(CASES)}")
        picked += [name for name in found if name not in picked]
    return picked


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64; infinite where value is not finite."""
    value, reference = value.detach().double(), reference.detach().double()
    if value.shape != reference.shape or not torch.isfinite(value).all():
        return float("inf")
    size = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(value - reference)) / (size if size > 0 else 1.0)


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    device: torch.device,
    seconds: float = 120.0,
) -> dict[str, Timing]:
    """Time the candidates one after the other, `rounds[name]` times each, after one warm-up call each.

    Rounds end early, after at least one, when all together have taken `seconds`.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    _wait(device)
    began = time.perf_counter()
    for turn in range(max(rounds.values())):
        if turn and time.perf_counter() - began > seconds:
            break
        for name, run in candidates.items():
            # A candidate with fewer rounds takes part in the first ones.
            if turn >= rounds[name]:
                continue
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            taken[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(t)) for name, t in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment() -> dict[str, str]:
    """What a figure must be read with: date, hardware, versions, threads, commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def print_report(report: Report, name: str) -> None:
    """The checks; then, only where all of them passed, the times, ratios and bars."""
    print(f"\n{name}: {report.shape}")
    for check in report.checks:
        verdict = "ok" if check.passed else "WRONG"
        print(f"  check  {check.name:<28} error {check.error:9.2e}   limit {check.limit:.0e}   {verdict}")
    for note in report.notes:
        print(f"  note   {note}")
    if not report.correct:
        print("  no times: a check failed")
        return
    for who, timing in report.timings.items():
        median, best = f"median {timing.median * 1e3:9.2f} ms", f"best {timing.best * 1e3:9.2f} ms"
        times = "" if who == report.ours else f"   {report.ratio(who):8.1f} x ours"
        print(f"  time   {who:<44} {median}   {best}{times}")
    for bar in report.bars:
        met = report.met(bar)
        said = "not timed" if met is None else f"{report.ratio(bar.peer):.1f} x: {'met' if met else 'MISSED'}"
        print(f"  bar    at least {bar.ratio:g} x faster than {bar.peer}: {said}")


def write_csv(path: Path, reports: Mapping[str, Report]) -> None:
    """One row a timing, the environment in every row. Cases whose check failed have no row."""
    facts = environment()
    columns = [
        *facts,
        "case",
        "shape",
        "candidate",
        "median_ms",
        "best_ms",
        "rounds",
        "times_ours",
        "bar",
        "bar_met",
    ]
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        for name, report in reports.items():
            if not report.correct:
                continue
            bars = {bar.peer: bar for bar in report.bars}
            for who, timing in report.timings.items():
                bar = bars.get(who)
                rows.writerow(
                    {
                        **facts,
                        "case": name,
                        "shape": report.shape,
                        "candidate": who,
                        "median_ms": f"{timing.median * 1e3:.4f}",
                        "best_ms": f"{timing.best * 1e3:.4f}",
                        "rounds": len(timing.seconds),
                        "times_ours": f"{report.ratio(who):.3f}",
                        "bar": "" if bar is None else bar.ratio,
                        "bar_met": "" if bar is None else report.met(bar),
                    }
                )


def run(names: list[str], options: Options, csv_path: Path | None, require_bars: bool) -> int:
    """Run the named cases and print them.

    Returns 0, or 1 where a check failed, or, with `require_bars`, 2 where a bar was missed.
    """
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    reports: dict[str, Report] = {}
    for name in names:
        try:
            reports[name] = CASES[name](options)
        except Unavailable as why:
            print(f"\n{name}: skipped, {why}")
            continue
        print_report(reports[name], name)
        sys.stdout.flush()
    if csv_path is not None:
        write_csv(csv_path, reports)
        print(f"\nwritten: {csv_path}")
    wrong = [name for name, report in reports.items() if not report.correct]
    missed = [
        f"{name} beside {bar.peer}"
        for name, report in reports.items()
        if report.correct
        for bar in report.bars
        if not report.met(bar)
    ]
    if wrong:
        print(f"\nWRONG: {', '.join(wrong)}")
        return 1
    if missed:
        print(f"\nbars not met: {'; '.join(missed)}")
        return 2 if require_bars else 0
    return 0

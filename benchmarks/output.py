"""What a run leaves: the printed tables, `figures.csv`, `checks.csv`, and what the figures must be read with.

Nothing that was measured in a report with a failed check is printed or written.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import Figure, Outcome, Report

# Distributions whose versions stand beside the figures where they are installed.
PEERS = ("mamba-ssm", "causal-conv1d", "mambapy", "transformers")
# Cases with more checks than this print those nearest to their limits.
SHOWN_CHECKS = 12


def environment() -> dict[str, str]:
    """What a figure must be read with: date, hardware, versions, threads, commit."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", *PEERS):
        facts[name] = _version(name)
    return facts


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


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


def number(value: float) -> str:
    """Four significant digits, without an exponent between 0.001 and a million."""
    if value != value:
        return "-"
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = max(0, 4 - len(str(int(abs(value))))) if abs(value) >= 1 else 4
    return f"{value:,.{digits}f}"


def report_lines(report: Report) -> Iterator[str]:
    """The checks; then, only where all of them passed, notes and figures with ratios and bars."""
    yield f"{report.case}: {report.shape}"
    yield from _check_lines(report)
    for note in report.notes:
        yield f"  note   {note}"
    if not report.correct:
        yield "  no figures: a check failed"
        return
    if not report.figures:
        return
    yield (
        f"  {'what':<26} {'who':<34} {'median':>14} {'middle half':>19} {'rounds':>6} {'x ours':>7} "
        f"{'at most':>9}"
    )
    whats = list(dict.fromkeys(figure.what for figure in report.figures))
    for what in whats:
        for figure in report.figures:
            if figure.what == what:
                yield _figure_line(report, figure)


def _check_lines(report: Report) -> Iterator[str]:
    failed = [check for check in report.checks if not check.passed]
    passed = [check for check in report.checks if check.passed]
    passed.sort(key=lambda check: check.error / check.limit if check.limit else 0.0, reverse=True)
    shown = passed if len(passed) <= SHOWN_CHECKS and not report.figures else passed[:1]
    for check in failed:
        yield f"  check  {check.name}: error {check.error:.2e}, at most {check.limit:.0e}: WRONG"
    if report.figures and passed:
        worst = passed[0]
        yield (
            f"  check  {len(passed)} passed; nearest to its limit: {worst.name}, error {worst.error:.2e}, "
            f"at most {worst.limit:.0e}"
        )
        return
    if len(passed) > SHOWN_CHECKS:
        shown = passed[:SHOWN_CHECKS]
        yield f"  check  {len(passed)} passed, of which nearest to their limits:"
    for check in shown:
        yield f"  check  {check.name}: error {check.error:.2e}, at most {check.limit:.0e}: ok"


def _figure_line(report: Report, figure: Figure) -> str:
    low, high = figure.quartiles
    spread = f"{number(low)} .. {number(high)}" if len(figure.samples) > 1 else ""
    own = figure.who == report.ours
    ratio = "" if own else number(report.ratio(figure.what, figure.who))
    bar = report.bar(figure.what) if own else None
    said = ""
    if bar is not None:
        limit, met = report.limit(bar), report.met(bar)
        said = f"{'?' if limit is None else number(limit):>9} {verdict(met)}"
        if bar.beside is not None:
            said += f" ({bar.at_most:.3g} of {bar.beside})"
    if figure.what in report.rates and figure.unit == "ms":
        amount, unit = report.rates[figure.what]
        said = f"{said or ' ' * 9} {amount / figure.median * 1e3:,.0f} {unit}/s"
    line = (
        f"  {figure.what:<26} {figure.who:<34} {number(figure.median):>11} {figure.unit:<3}"
        f"{spread:>19} {len(figure.samples):>6} {ratio:>7} {said}"
    )
    return line.rstrip()


def verdict(met: bool | None) -> str:
    return "not told" if met is None else "met" if met else "MISSED"


def summary_lines(outcome: Outcome) -> Iterator[str]:
    """The bars of the whole run in one table, then what was left out, wrong or broken."""
    bars = list(outcome.bars())
    if bars:
        yield f"{'bar':<24} {'shape':<34} {'what':<26} {'measured':>12} {'at most':>10}"
        for report, bar in bars:
            figure, limit = report.figure(bar.what, report.ours), report.limit(bar)
            measured = "-" if figure is None else f"{number(figure.median)} {figure.unit}"
            asked = "-" if limit is None else number(limit)
            yield (
                f"{report.case:<24} {report.shape[:34]:<34} {bar.what:<26} {measured:>12} {asked:>10}  "
                f"{verdict(report.met(bar))}"
            )
    for name, why in outcome.skipped.items():
        yield f"{name}: skipped, {why}"
    for name, why in outcome.broken.items():
        yield f"{name}: BROKEN, {why}"
    if outcome.wrong:
        yield f"WRONG: {', '.join(outcome.wrong)}"


@dataclass(frozen=True)
class Row:
    """One line of `figures.csv`: a figure with its report's names, ratio and bar."""

    case: str
    shape: str
    length: int | None
    what: str
    who: str
    ours: bool
    median: float
    low: float
    high: float
    unit: str
    rounds: int
    times_ours: float | None
    at_most: float | None
    met: bool | None


COLUMNS = tuple(Row.__dataclass_fields__)


def rows(reports: Iterable[Report]) -> Iterator[Row]:
    """The figures of the reports whose checks all passed."""
    for report in reports:
        if not report.correct:
            continue
        for figure in report.figures:
            own = figure.who == report.ours
            bar = report.bar(figure.what) if own else None
            ratio = report.ratio(figure.what, figure.who)
            yield Row(
                case=report.case,
                shape=report.shape,
                length=report.length,
                what=figure.what,
                who=figure.who,
                ours=own,
                median=figure.median,
                low=figure.quartiles[0],
                high=figure.quartiles[1],
                unit=figure.unit,
                rounds=len(figure.samples),
                times_ours=None if ratio != ratio else ratio,
                at_most=None if bar is None else report.limit(bar),
                met=None if bar is None else report.met(bar),
            )


def write_figures(path: Path, found: Iterable[Row]) -> None:
    """`figures.csv`: one row a figure, the environment in every row."""
    facts = environment()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *facts])
        writer.writeheader()
        for row in found:
            values = {name: getattr(row, name) for name in COLUMNS}
            writer.writerow({k: "" if v is None else v for k, v in values.items()} | facts)


def read_figures(path: Path) -> list[Row]:
    """The rows of a `figures.csv`, as they were written."""
    with open(path, newline="", encoding="utf-8") as file:
        return [_row(values) for values in csv.DictReader(file)]


def _row(values: dict[str, str]) -> Row:
    def real(name: str) -> float | None:
        return float(values[name]) if values[name] else None

    return Row(
        case=values["case"],
        shape=values["shape"],
        length=int(values["length"]) if values["length"] else None,
        what=values["what"],
        who=values["who"],
        ours=values["ours"] == "True",
        median=float(values["median"]),
        low=float(values["low"]),
        high=float(values["high"]),
        unit=values["unit"],
        rounds=int(values["rounds"]),
        times_ours=real("times_ours"),
        at_most=real("at_most"),
        met={"True": True, "False": False}.get(values["met"]),
    )


def write_checks(path: Path, reports: Iterable[Report]) -> None:
    """`checks.csv`: every comparison with its error and limit, passed or not."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "shape", "check", "error", "limit", "passed"])
        for report in reports:
            for check in report.checks:
                writer.writerow(
                    [report.case, report.shape, check.name, check.error, check.limit, check.passed]
                )

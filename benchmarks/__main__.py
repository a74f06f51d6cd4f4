"""`python -m benchmarks`: ops, blocks and models beside their peers; `--help` lists the options, `--list` the
cases."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.harness import CASES, Options, Report, chosen, run
from benchmarks.output import (
    environment,
    report_lines,
    rows,
    summary_lines,
    write_checks,
    write_figures,
)

# Importing them registers their cases, in the order in which a run takes them.
MODULES = (
    "scan",
    "block",
    "directions",
    "ops",
    "host",
    "models",
    "steps",
    "large",
    "accuracy",
    "lengths",
    "vision",
    "cpu",
    "hidden_rows",
)
OUT = Path("runs/benchmarks")
# Seconds that a whole run may take; cases named by --only take what they need.
WHOLE, QUICK = 225.0, 50.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed, memory and accuracy of the ops beside their peers."
    )
    parser.add_argument(
        "--only", help="names of cases, or how they begin, joined by commas, e.g. scan_b8,conv"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the main cases with fewer rounds, within a minute"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for figures.csv, checks.csv and plots (default {OUT}; with --only none are written)",
    )
    parser.add_argument("--repeats", type=int, help="rounds timed (default 15; quick 7)")
    parser.add_argument(
        "--slow-repeats", type=int, default=3, help="rounds of peers that take seconds (default 3)"
    )
    parser.add_argument("--budget", type=float, help="seconds after which no further case begins")
    parser.add_argument("--device", default="cuda", help="where the cases for a GPU run (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="cut every size to almost nothing: does it run?")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--require-bars", action="store_true", help="exit with 2 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a check failed or a case broke; with --require-bars 2 where a bar was missed."""
    for module in MODULES:
        importlib.import_module(f"benchmarks.{module}")
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, one in CASES.items():
            print(f"{name:<20} {one.about}")
        return 0
    for flag in ("repeats", "slow_repeats", "threads"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} is {value}, expected at least 1")
    try:
        names = chosen(arguments.only, arguments.quick)
        device = torch.device(arguments.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = Options(
        repeats=arguments.repeats or (7 if arguments.quick else 15),
        slow_repeats=arguments.slow_repeats,
        seconds=1.5 if arguments.quick else 6.0,
        device=device,
        tiny=arguments.tiny,
        quick=arguments.quick,
    )
    budget = arguments.budget
    if budget is None and arguments.only is None and device.type == "cuda" and torch.cuda.is_available():
        budget = QUICK if arguments.quick else WHOLE
    out = arguments.out
    if out is None and arguments.only is None:
        out = OUT
    return _run(names, options, budget, out, arguments.require_bars)


def _run(
    names: list[str], options: Options, budget: float | None, out: Path | None, require_bars: bool
) -> int:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{key} {value}" for key, value in environment().items() if value != "none"))
    if options.tiny:
        print("tiny sizes: the figures mean nothing")

    def show(report: Report) -> None:
        print("\n" + "\n".join(report_lines(report)), flush=True)

    outcome = run(names, options, budget, show)
    print("\n" + "\n".join(summary_lines(outcome)))
    if out is not None:
        _write(out, outcome.reports)
    return outcome.code(require_bars)


def _write(out: Path, reports: list[Report]) -> None:
    found = list(rows(reports))
    write_figures(out / "figures.csv", found)
    write_checks(out / "checks.csv", reports)
    written = [out / "figures.csv", out / "checks.csv"]
    try:
        from benchmarks.plots import draw

        written += draw(found, out)
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)")
    print(f"written: {', '.join(str(path) for path in written)}")


if __name__ == "__main__":
    sys.exit(main())

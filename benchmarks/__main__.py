"""`python -m benchmarks`: the ops beside their peers; `--help` lists the options, `--list` the cases."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import cpu, cuda  # noqa: F401 - importing them registers their cases
from benchmarks.harness import CASES, Options, chosen, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed of the ops beside their peers."
    )
    parser.add_argument("--only", help="names of cases, or how they begin, joined by commas, e.g. cpu_scan")
    parser.add_argument("--csv", type=Path, help="also write the figures to this file")
    parser.add_argument("--repeats", type=int, default=15, help="rounds timed (default 15)")
    parser.add_argument(
        "--slow-repeats", type=int, default=3, help="rounds of peers that take seconds (default 3)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--require-bars", action="store_true", help="exit with 2 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for name, function in CASES.items():
            print(f"{name:<20} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    for flag in ("repeats", "slow_repeats", "threads"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}, expected at least 1")
    if arguments.csv is not None and not arguments.csv.resolve().parent.is_dir():
        parser.error(f"--csv {arguments.csv}: there is no folder {arguments.csv.resolve().parent}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        names = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    options = Options(arguments.repeats, arguments.slow_repeats)
    return run(names, options, arguments.csv, arguments.require_bars)


if __name__ == "__main__":
    sys.exit(main())

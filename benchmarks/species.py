"""Accuracy by window length over all folds: `python -m benchmarks.species runs/species-*/windows.csv`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssm_modal.tasks.species import pool_folds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.species", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("windows", nargs="+", type=Path, help="the windows.csv of each fold's run")
    print(pool_folds(parser.parse_args(argv).windows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

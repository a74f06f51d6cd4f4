"""The list of what a run leaves out."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.recordings import LeftOut


def write_left_out(file: Path, left_out: Sequence[LeftOut]) -> None:
    """Write `left_out` to the CSV file `file` (`path,reason`), whole or not at all."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "reason"])
    writer.writerows([os.fspath(one.path), one.reason] for one in left_out)
    atomic_write(file, table.getvalue())

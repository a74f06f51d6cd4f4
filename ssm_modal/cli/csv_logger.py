"""Metrics as a CSV file that a resumed run goes on with."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssm_modal.io.atomic import atomic_write


class CsvLogger(Logger):
    """Appends a row a call to `<folder>/metrics.csv`, each flushed, columns added as they come.

    Lightning's own CSV logger deletes an earlier file of the same folder; this one keeps it.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in the run's folder holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        columns = self._read_columns()
        new = [name for name in row if name not in columns]
        if new or not self.path.exists():
            rows = self.rows()
            self._columns = ["step", *sorted({*columns, *new} - {"step"})]
            atomic_write(self.path, self._text([*rows, row], self._columns))
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, restval="").writerow(row)

    @rank_zero_only
    def drop_from(self, step: int) -> None:
        """Drop the rows of `step` and later: a run resumed after `step` steps writes them again."""
        if self.path.exists():
            kept = [row for row in self.rows() if row["step"] == "" or int(row["step"]) < step]
            atomic_write(self.path, self._text(kept, self._read_columns()))

    def rows(self) -> list[dict[str, str]]:
        """The rows of the file as text; a last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        return [row for row in reader if None not in row.values()]

    def _read_columns(self) -> list[str]:
        if self._columns is None:
            self._columns = []
            if self.path.exists():
                with open(self.path, newline="", encoding="utf-8") as file:
                    self._columns = next(csv.reader(file), [])
        return self._columns

    @staticmethod
    def _text(rows: list[Any], columns: list[str]) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

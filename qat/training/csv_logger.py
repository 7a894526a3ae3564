"""A metrics.csv that a resumed run continues, so that it ends as if the run had never been killed."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from ..errors import TrainingError
from .folders import require_writable

FILE = "metrics.csv"


class ResumableCSVLogger(Logger):
    """Writes each row when it is logged. Columns appear in the order in which they are first logged.

    Args:
        save_dir: the folder that holds metrics.csv.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / FILE
        self._columns: list[str] = []

    @property
    def name(self) -> None:
        """Runs are told apart by their folder, not by a name."""

    @property
    def version(self) -> None:
        """Runs are told apart by their folder, not by a version."""

    @property
    def save_dir(self) -> str:
        """The folder that holds metrics.csv."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Hydra keeps the run's config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._read()
            self._columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of that step and later ones, and the columns that only they had.

        Raises:
            TrainingError: nothing can be written in the folder, or over the file.
        """
        require_writable(self.path.parent, "logger.save_dir")
        if self.path.is_dir():
            raise TrainingError(f"{self.path} is a folder, and the log would be a file: move it away")
        rows = [row for row in self._read() if int(row["step"]) < step]
        header = list(rows[0]) if rows else []
        self._columns = [name for name in header if any(row[name] for row in rows)]
        if rows:
            self._rewrite([{name: row[name] for name in self._columns} for row in rows])
        else:
            self.path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".tmp")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(new, self.path)

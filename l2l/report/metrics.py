"""Scalars of a run, to ``metrics.csv`` and TensorBoard at once."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import final

from l2l.report.files import write_whole


@final
class MetricsLog:
    """Appends rows of scalars. The step column comes first; a column not given in a row stays empty.

    Args:
        after: keep only the rows up to this step of what an interrupted run wrote; None starts a new file.
    """

    def __init__(self, folder: Path, columns: tuple[str, ...], after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.columns = ("step", *columns)
        self._path = folder / "metrics.csv"
        kept = (
            [] if after is None or not self._path.exists() else [r for r in read_metrics(self._path) if int(r["step"]) <= after]
        )
        write_whole(self._path, lambda path: self._write(path, kept))
        self._file = self._path.open("a", newline="")
        self._rows = csv.DictWriter(self._file, self.columns)
        self._board = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def _write(self, path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def log(self, step: int, **values: float) -> None:
        """One row."""
        self._rows.writerow({"step": step, **values})
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a ``metrics.csv``; a last line that a crash cut short is left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and row["step"].isdigit()]

"""Logs of a run: CSV files, and TensorBoard's where it is installed."""

import csv
import importlib.util
from pathlib import Path

from ..io.atomic import replacing

TITLES = {"steps": "training", "validation": "validation"}  # of the tables in TensorBoard


class Table:
    """A CSV file with a row per logged step. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows, self.columns = [], []
        if path.exists() and step > 0:
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= step]
        self._write()

    def add(self, row: dict):
        self.rows.append(row)
        if set(row) <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        else:
            self._write()

    def _write(self):
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if columns:
                writer.writeheader()
            writer.writerows(self.rows)
        self.columns = columns


class RunLog:
    """`steps.csv` and `validation.csv` in a folder, and the same values for TensorBoard."""

    def __init__(self, folder: Path, step: int, tensorboard: bool | None):
        self._tables = {name: Table(folder / f"{name}.csv", step) for name in TITLES}
        self._board = None
        if has_tensorboard() if tensorboard is None else tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def add(self, table: str, step: int, values: dict[str, float]):
        """Add a row to "steps" or "validation"."""
        self._tables[table].add({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{TITLES[table]}/{name}", value, step)

    def close(self):
        if self._board:
            self._board.close()


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None

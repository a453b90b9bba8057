"""CSV files that commands write."""

import csv


def read_csv(path):
    """Return the rows as dictionaries."""
    with path.open() as file:
        return list(csv.DictReader(file))

"""Progress statistics: loss, speed and the share of time spent waiting for data."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Throughput:
    """Statistics of the steps since the last call of `pop`."""

    def __init__(self):
        self.restart()

    def restart(self):
        self._begin, self._waited, self._losses = time.perf_counter(), 0.0, []

    def wait(self, function: Callable[[], T]) -> T:
        """Return function(); count its time as waiting for data."""
        begin = time.perf_counter()
        result = function()
        self._waited += time.perf_counter() - begin
        return result

    def add(self, loss: float):
        self._losses.append(loss)

    def pop(self) -> dict[str, float]:
        """Return the statistics and begin anew."""
        seconds = time.perf_counter() - self._begin
        values = {
            "loss": sum(self._losses) / max(1, len(self._losses)),
            "steps_per_second": len(self._losses) / seconds,
            "waiting": self._waited / seconds,
        }
        self.restart()
        return values

"""What the progress line tells: loss, speed, and how long a run waits for data."""

import time

from .group import Group


class Window:
    """Loss, speed and time spent waiting for data since the last look."""

    def __init__(self, group: Group):
        self.group, self.stop = group, False
        self.restart()

    def restart(self):
        self._begin, self._waited, self._losses = time.perf_counter(), 0.0, []

    def waiting(self, function):
        begin = time.perf_counter()
        result = function()
        self._waited += time.perf_counter() - begin
        return result

    def add(self, loss: float, stop: bool):
        self._losses.append(loss)
        self.stop = self.stop or stop

    def values(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._begin
        values = {
            "loss": sum(self._losses) / max(1, len(self._losses)),
            "steps_per_second": len(self._losses) / seconds,
            "waiting": self._waited / seconds,
        }
        self.restart()
        return values

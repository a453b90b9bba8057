"""Values on their way from the device to the host."""

from collections import deque

import torch
from torch import Tensor


class Readback:
    """Queue of small tensors, each with the number of its step, read without a wait for the steps behind it."""

    def __init__(self):
        self._queue = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, step: int, values: Tensor):
        if values.device.type != "cuda":
            self._queue.append((step, values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(values.device))
        self._queue.append((step, host, copied))

    def is_ready(self) -> bool:
        """Return whether the oldest values have arrived."""
        return bool(self._queue) and (self._queue[0][2] is None or self._queue[0][2].query())

    def pop(self) -> tuple[int, Tensor]:
        """Return the oldest step and its values on the host, once they have arrived."""
        step, values, copied = self._queue.popleft()
        if copied is not None:
            copied.synchronize()
        return step, values

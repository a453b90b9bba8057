"""Processes of a run: one, or those that torchrun started."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import find_device
from ..errors import ConfigError
from ..torchrun import position

TIMEOUT = timedelta(days=20)  # for work that one process does for all, such as decoding images
T = TypeVar("T")


@dataclass
class World:
    """This process among all of a run, and among those of its machine (`local_rank`)."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0
    gloo: dist.ProcessGroup | None = None  # the same processes, with a long timeout

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def run_if(self, condition: bool, function: Callable[[], T]) -> T | None:
        """Return function() if the condition holds here, else None, once all processes are done.

        An error in one process is raised in all, in the others as a ConfigError.
        """
        result = error = None
        try:
            result = function() if condition else None
        except (ConfigError, OSError, MemoryError) as raised:
            error = raised
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error and (str(error) or type(error).__name__), self.gloo)
            error = error or next((ConfigError(text) for text in errors if text), None)
        if error:
            raise error
        return result

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def init_distributed(device: str | None = None) -> World:
    """Return the world that torchrun describes; it communicates by NCCL on GPUs, gloo on CPUs.

    "cuda", or no device if there is a GPU, is the GPU of this process's local rank. Raises ConfigError for a missing
    device.
    """
    _, size, local_rank = position()
    local_rank = local_rank or 0
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        device = f"cuda:{local_rank}"
    try:
        found = find_device(device or "cpu")
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    if found.type == "mps":
        raise ConfigError("--device is 'mps', expected cpu or cuda: training needs float64, which mps lacks")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if size == 1:
        return World(device=found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    gloo = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=TIMEOUT))
    return World(dist.get_rank(), dist.get_world_size(), found, local_rank, gloo)

"""The processes of a run: one, or as many as torchrun has started."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import find_device
from .config import ConfigError

PATIENCE = timedelta(days=20)  # for one process that does for all what takes its time


@dataclass
class Group:
    """This process among the others, `local` among those of its machine."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local: int = 0
    patient: dist.ProcessGroup | None = None  # the same processes, by gloo

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def after(self, is_mine: bool, function: Callable):
        """Return function() where `is_mine`, else None, when all processes that it is for are done with it.

        What one of them raises, all raise, the others as a ConfigError.
        """
        result = error = None
        try:
            result = function() if is_mine else None
        except (ConfigError, OSError, MemoryError) as raised:
            error = raised
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error and (str(error) or type(error).__name__), self.patient)
            error = error or next((ConfigError(text) for text in errors if text), None)
        if error:
            raise error
        return result

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


def join(device: str | None = None) -> Group:
    """Return the group that torchrun's variables in the environment tell of; NCCL on GPUs, gloo on CPUs.

    "cuda", and a GPU that nobody names, is that of the process. Raises ConfigError for a device that is not there.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        device = f"cuda:{local}"
    try:
        found = find_device(device or "cpu")
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    if found.type == "mps":
        raise ConfigError("--device is 'mps', expected cpu or cuda: training sums in float64, which that has not")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if world == 1:
        return Group(device=found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size(), found, local, patient)

"""The processes of a run: one, or as many as torchrun has started."""

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import find_device
from .config import ConfigError


@dataclass
class Group:
    """This process among the others."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self):
        """Return when all processes have come here."""
        if self.world > 1:
            dist.barrier()

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
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if world == 1:
        return Group(device=found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    return Group(dist.get_rank(), dist.get_world_size(), found)

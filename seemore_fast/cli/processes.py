"""Processes started by torchrun: their devices, and their results on the first of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..torchrun import position

TIMEOUT = timedelta(days=365)  # the processes' shares of the work may take very different times


def own_device(device: str) -> str:
    """Return the device of this process: for "auto" or "cuda", torchrun's processes get a GPU each."""
    local = position().local_rank
    if local is None or device not in ("auto", "cuda"):
        return device
    return f"cuda:{local}" if device == "cuda" or torch.cuda.is_available() else "cpu"


@contextmanager
def gathered(value: object) -> Iterator[list | None]:
    """Yield the values of all processes on the first, None on the others; all leave the block together."""
    rank, world, _ = position()
    if world == 1:
        yield [value]
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    values = [None] * world if rank == 0 else None
    dist.gather_object(value, values)
    yield values
    dist.barrier()  # torchrun ends the others if one leaves early with a failure
    dist.destroy_process_group()

"""How large the tiles of each kernel are, and how many warps work on one: a small table per architecture.

Nothing is tried out at a first call. `python benchmarks/tune_triton.py` measures and writes the table for the GPU at
hand.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
MEANT = 90  # the architecture whose configurations tensors get that are on no GPU


class Configuration(NamedTuple):
    pixels: int  # of a tile
    warps: int
    stages: int = 1  # loads of so many turns of a loop at a time


def configuration(kernel: str, x: Tensor) -> Configuration:
    """Return that of a kernel for images like x: by architecture, bytes of an element and channels, to 48 or more."""
    architecture = MEANT
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        architecture = 10 * major + minor
    return choose(kernel, architecture, x.element_size(), x.shape[1])


def choose(kernel: str, architecture: int, size: int, channels: int) -> Configuration:
    """Return the configuration of the newest architecture in the table that is not newer than the one asked for."""
    known = table()
    architectures = [int(name) for name in known]
    found = max((a for a in architectures if a <= architecture), default=min(architectures))
    return Configuration(*known[str(found)][kernel][f"{size} bytes{', many channels' if channels > 48 else ''}"])


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(FILE.read_text())

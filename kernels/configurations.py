"""Sizes of each kernel's tiles, and warps that work on one: a small table per architecture.

Nothing is tried out at a first call. `python benchmarks/tune_triton.py` measures and writes the table for the GPU at
hand. An architecture that is not in the table takes the entries of the next older one. Those of sm_80 have the fewest
instructions for an image among those that do not spill, as the compiler reports it. With two warps, or less than 64
rows, Triton multiplies by mma.sync on every architecture: products this small gain nothing by wgmma or tcgen05.
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
    registers: int = 0  # of a thread at most; 0 leaves it to ptxas, which may spill for more warps at a time


def configuration(kernel: str, x: Tensor) -> Configuration:
    """Return that of a kernel for images like x: by architecture, bytes of an element and channels, to 48 or more."""
    architecture = MEANT
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        architecture = 10 * major + minor
    return choose(kernel, architecture, x.element_size(), x.shape[1])


def choose(kernel: str, architecture: int, size: int, channels: int) -> Configuration:
    """Return the configuration of the newest architecture in the table that is not newer than the one asked for.

    ValueError for one that is older than all of them: before sm_80 Triton has no matrix units, and kernels spill.
    """
    known = table()
    architectures = sorted(int(name) for name in known)
    if architecture < architectures[0]:
        expected = f'expected sm_{architectures[0]} or newer; use_backend("reference") runs on all'
        raise ValueError(f"{kernel}: no configuration for sm_{architecture}, {expected}")
    found = max(a for a in architectures if a <= architecture)
    return Configuration(*known[str(found)][kernel][f"{size} bytes{', many channels' if channels > 48 else ''}"])


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(FILE.read_text())

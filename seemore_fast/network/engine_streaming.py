"""Streaming of an image by the GPU's engine: its features wait in the host's memory, bands of rows go to the GPU.

Between two global pools everything is local, so a pass over the image finishes a group and begins the next one, by the
kernels of a whole call. The GPU keeps the pool's sums and the small map of all pixels. The result is that of the whole
call to the bit. csrc/cuda/network/network.cu has the order of copies and launches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import lookup_kernel
from .engine import Network, config_of, pack

IMAGE_HALO = 3  # rows of the image around a band that it reads
HEAD_BYTES = 64  # of a pixel's features, which lie apart from those of its other channels
LEAST_ROWS = 12  # of a band: it reads eleven rows of the one before, which is not stored yet


class PartMemory(NamedTuple):
    """Bytes of a run in bands: of a band and of all else on the GPU, of the features; and `unit` of a band's rows."""

    band: int
    rest: int
    features: int
    unit: int


def part_memory(model: Network, height: int, width: int, rows: int = 0) -> PartMemory:
    """Return the memory that an image takes in bands of `rows` rows, by default of as few as there can be."""
    function = lookup_kernel("network", model.mean, part="_part_memory")

    def needed(rows: int) -> PartMemory:
        return PartMemory(*function(config_of(model).numbers(), height, width, rows))

    unit = needed(LEAST_ROWS).unit
    unit *= -(-LEAST_ROWS // unit)
    return needed(rows or unit)._replace(unit=unit)


def stream(
    model: Network,
    x: Tensor,
    y: Tensor,
    features: Tensor,
    rows: int,
    release: Callable[[int, int], None] = lambda begin, end: None,
    progress: Callable[[float], None] = lambda share: None,
) -> bool:
    """Write model(x) to y, both (1, C, H, W) on the host, and both float32, uint8 or uint16, in bands of `rows` rows.

    Integer images are scaled to [0, 1]; returns False if the network produced NaN or inf.

    features    uint8, of `part_memory`'s size, best in pinned memory; overwritten
    rows        a multiple of `part_memory`'s unit
    release     is called with bytes [begin, end) of `features` that are not needed for a while
    progress    is called with the share of the work that is done
    """
    config, device, scale = config_of(model), model.mean.device, model.scale
    height, width = x.shape[2:]
    weights, is_packed = model.engine_weights(config)
    packed, mean = weights[0] if is_packed else pack(weights, config), model.mean.flatten().float().contiguous()
    needed = part_memory(model, height, width, rows)
    band, rest = (torch.empty(count, dtype=torch.uint8, device=device) for count in (needed.band, needed.rest))
    is_finite = None if y.dtype == torch.float32 else torch.ones(1, dtype=torch.int32, device=device)
    part, before = lookup_kernel("network", mean, part="_part"), (0, 0)
    for number in range(config.groups + 1):
        for top in range(0, height, rows):
            bottom, first = min(top + rows, height), max(top - IMAGE_HALO, 0)
            is_last, of_x, of_y = number == config.groups, None, None
            if number == 0 or is_last:
                of_x = x[:, :, first : bottom + IMAGE_HALO].to(device)
            if is_last:
                of_y = torch.empty(1, y.shape[1], (bottom - top) * scale, width * scale, dtype=y.dtype, device=device)
            place = [height, width, number, top, bottom, *before, first, rows]
            part(of_y, of_x, features, band, rest, packed, mean, model.img_range, config.numbers(), place, is_finite)
            head, tail = HEAD_BYTES * width, needed.features // height - HEAD_BYTES * width
            release(before[0] * head, before[1] * head)
            release(height * head + before[0] * tail, height * head + before[1] * tail)
            before = (0, 0) if is_last else (top, bottom)
            if of_y is not None:
                y[:, :, top * scale : bottom * scale].copy_(of_y)
            progress((number + bottom / height) / (config.groups + 1))
    return is_finite is None or bool(is_finite)

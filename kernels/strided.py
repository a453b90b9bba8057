"""Images of any strides as arguments of kernels, tiles of their planes, and stores that round.

A plane is one (batch, channel) of an image. Offsets are 64-bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.planes import new_image
from .integers import cdiv, next_power_of_2
from .launch import Launch
from .rounding import round_to

WIDEST = 64  # columns of a tile, at most: divides the usual widths, and whole lines of memory even for 16-bit pixels


# On the host


def strided(**images: Tensor | None) -> dict:
    """Return each image and its strides as the kernels' arguments `name` and `name_strides`."""
    strides = {f"{name}_strides": None if image is None else image.stride() for name, image in images.items()}
    return images | strides


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are of: float32, or float64 for that."""
    return torch.promote_types(dtype, torch.float32)


def new_workspace(x: Tensor) -> Tensor:
    return new_image(x, x.shape[1], accumulation_dtype(x.dtype))


def index_type(largest: int) -> tl.dtype:
    return tl.int64 if largest >= 2**31 else tl.int32


class Tiles(NamedTuple):
    """How programs share out the planes of images: each has a tile of lines x columns of one of them."""

    lines: int  # of a tile
    columns: int
    of_a_plane: int
    warps: int  # of a program


def tiles_of(lines: int, columns: int, most: int, each: int, widest: int = WIDEST, least: int = 1) -> Tiles:
    """Return tiles of at most `most` elements, for planes of lines x columns; a thread has `each` of a tile's.

    Sides are powers of two, at least `least`.
    """
    across = min(widest, max(16, next_power_of_2(columns)))
    down = max(least, min(most // across, next_power_of_2(lines)))
    warps = max(1, min(8, across * down // (32 * each)))
    return Tiles(down, across, cdiv(lines, down) * cdiv(columns, across), warps)


def over_planes(kernel, x: Tensor, tiles: Tiles, arguments: dict, **more_options: int) -> Launch:
    """Describe a launch with one program per tile of each plane of x."""
    batch, channels = x.shape[:2]
    tile = dict(channels=channels, LINES=tiles.lines, COLUMNS=tiles.columns)
    return Launch(kernel, batch * channels * tiles.of_a_plane, arguments | tile, tiles.warps, more_options)


# In kernels


@triton.jit
def locate_tile(channels, lines, columns, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the program's batch and channel, the number of its tile among the channel's, first line and column."""
    across = (columns + COLUMNS - 1) // COLUMNS
    tiles = (lines + LINES - 1) // LINES * across
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch = plane // channels
    return batch, plane % channels, batch * tiles + tile, tile // across * LINES, tile % across * COLUMNS


@triton.jit
def level_strides(batch, height, width):
    """Return the strides of small images that lie as (C, B, height, width) and are seen as (B, C, height, width)."""
    plane = height.to(tl.int64) * width
    return plane, plane * batch, width, 1


@triton.jit
def pixels_of(image, strides, batch, channel, row, column):
    """Return pointers to pixels; offsets are 64-bit."""
    plane = image + batch.to(tl.int64) * strides[0] + channel.to(tl.int64) * strides[1]
    return plane + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@triton.jit
def store(pointers, values, mask):
    """tl.store that rounds to the nearest also in Triton's interpreter."""
    tl.store(pointers, round_to(values, pointers.dtype.element_ty), mask=mask)

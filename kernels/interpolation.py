"""Bilinear interpolation along one axis, and its transpose: two of a kind make that of an image.

As torch's, with align_corners=False: pixel i of the longer axis looks at (i + 1 / 2) smaller / size - 1 / 2 on the
shorter one, or, where that is before its first or behind its last pixel, at that.
"""

import math
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .strided import level_strides, locate_tile, over_planes, pixels_of, store, strided, tiles_of

# What is launched


def stretching(
    large: Tensor, small: Tensor, k: Tensor | None = None, *, is_level: bool = False, vertical: bool
) -> Launch:
    """Describe large = k + small, stretched along one axis; small may be a level (`images.level_strides`)."""
    images = strided(large=large, k=k) | small_of(small, is_level)
    # Few rows are stretched to all columns before they are to all rows: tiles of fixed sizes fit both.
    tile = dict(most=4096) if vertical else dict(most=1024, least=16)
    return along(stretch, large, images | sizes_of(large, small, vertical), each=16, **tile)


def gathering(small: Tensor, large: Tensor, *, is_level: bool = False, vertical: bool) -> Launch:
    """Describe the transpose: small = sums over large."""
    sizes = sizes_of(large, small, vertical)
    shrinks = sizes["size"] / sizes["smaller"]
    # Pixels that look at pixel m are fewer than so many before m * shrinks, rounded down, and in all
    before = math.ceil(shrinks / 2) + 1
    count = before + math.ceil(1.5 * shrinks) + 1
    arguments = strided(large=large) | small_of(small, is_level) | sizes | dict(before=before, count=count)
    # A thread sums 32 bytes of neighbours, eight float32; where rows are shrunk, one pixel, for there are few.
    size = small.element_size()
    tile = dict(most=8192 // size, each=32 // size) if vertical else dict(most=256, each=1)
    # Left to itself, ptxas spills some registers for more warps at a time (sm_86, sm_89).
    return replace(along(gather, small, arguments, **tile), more_options={"maxnreg": 255})


def small_of(small: Tensor, is_level: bool) -> dict:
    """Return the smaller image as the kernels' arguments; they know the strides of a level."""
    return dict(small=small, small_strides=None if is_level else small.stride(), batch=len(small))


def sizes_of(large: Tensor, small: Tensor, vertical: bool) -> dict:
    axis = 2 if vertical else 3
    return dict(size=large.shape[axis], smaller=small.shape[axis], VERTICAL=vertical)


def along(kernel, y: Tensor, arguments: dict, **tile: int) -> Launch:
    height, width = y.shape[2:]
    tiles = tiles_of(height, width, **tile)
    return over_planes(kernel, y, tiles, arguments | dict(height=height, width=width))


# Kernels


@triton.jit(do_not_specialize=["channels", "batch", "height", "size", "smaller"])
def stretch(
    large, large_strides, small, small_strides, k, k_strides, channels, batch, height, width, size, smaller,
    VERTICAL: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """large (height, width) = k + small interpolated along one axis: from `smaller` pixels to `size`."""
    WIDE: tl.constexpr = small.dtype.element_ty
    if small_strides is None:
        small_strides = level_strides(batch, smaller if VERTICAL else height, width if VERTICAL else smaller)
    image, channel, _, line, column = locate_tile(channels, height, width, LINES, COLUMNS)
    row, column = line + tl.arange(0, LINES)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    looks = position(row if VERTICAL else column, size, smaller, WIDE)
    before = tl.minimum(looks.to(tl.int32), smaller - 1)
    behind = tl.minimum(before + 1, smaller - 1)
    share = looks - before.to(WIDE)
    if VERTICAL:
        first_at = pixels_of(small, small_strides, image, channel, before, column)
        second_at = pixels_of(small, small_strides, image, channel, behind, column)
    else:
        first_at = pixels_of(small, small_strides, image, channel, row, before)
        second_at = pixels_of(small, small_strides, image, channel, row, behind)
    total = (1 - share) * tl.load(first_at, mask=inside, other=0) + share * tl.load(second_at, mask=inside, other=0)
    if k is not None:
        total += tl.load(pixels_of(k, k_strides, image, channel, row, column), mask=inside, other=0).to(WIDE)
    store(pixels_of(large, large_strides, image, channel, row, column), total, inside)


@triton.jit(do_not_specialize=["channels", "batch", "height", "size", "smaller", "before", "count"])
def gather(
    small, small_strides, large, large_strides, channels, batch, height, width, size, smaller, before, count,
    VERTICAL: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """small (height, width) = stretch transposed: the sums over what looks at its pixels."""
    WIDE: tl.constexpr = small.dtype.element_ty
    if small_strides is None:
        small_strides = level_strides(batch, height, width)
    image, channel, _, line, column = locate_tile(channels, height, width, LINES, COLUMNS)
    row, column = line + tl.arange(0, LINES)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    here = row if VERTICAL else column
    start = (here.to(tl.int64) * size // smaller).to(tl.int32) - before
    if VERTICAL:
        large_at = pixels_of(large, large_strides, image, channel, start, column)
    else:
        large_at = pixels_of(large, large_strides, image, channel, row, start)
    total = tl.zeros((LINES, COLUMNS), WIDE)
    for n in tl.range(0, count, loop_unroll_factor=4):
        looks = tl.minimum(position(start + n, size, smaller, WIDE), smaller - 1)
        share = 1 - tl.abs(looks - here.to(WIDE))
        exists = inside & (share > 0) & (start + n >= 0) & (start + n < size)
        total += share * tl.load(large_at, mask=exists, other=0).to(WIDE)
        large_at += large_strides[2 if VERTICAL else 3]
    tl.store(pixels_of(small, small_strides, image, channel, row, column), total, mask=inside)


@triton.jit
def position(i, size, small, WIDE: tl.constexpr):
    """Return where pixel i of an axis looks on the small map's, which is not cut off behind its last pixel.

    (i + 1 / 2) small / size - 1 / 2, rounded once: the numerator of what it is as one fraction is exact.
    """
    numerator, denominator = (i.to(WIDE) * 2 + 1) * small - size, tl.full((), 2, WIDE) * size
    found = numerator / denominator if numerator.dtype == tl.float64 else tl.div_rn(numerator, denominator)
    return tl.maximum(found, 0)

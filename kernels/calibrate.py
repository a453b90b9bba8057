"""Triton kernels of `calibrate`; formula and shapes in `seemore_fast.reference.calibrate`.

    forward   aggregate, two levels at a time        mix: depthwise 3x3,        stretch to all columns,
                                                     then the matrix            to all rows, and add k
    backward  gather rows, then columns:             mix_backward               spread: dk = dy + transposed aggregate,
              stretch transposed                                                two levels at a time

Level n is the n-th aggregation before GELU, without rows and columns that no later one reads. It is (B, C, height,
width), and in memory (C, B, height, width): the pixels of a batch are one row. `maps` holds levels 1, 2, ..
`recursive`, and the last one after GELU, one after another and of the accumulation dtype.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.planes import new_image
from .activation import activate, activate_with_slope
from .integers import cdiv
from .interpolation import gathering, stretching
from .launch import Launch, launched, named
from .strided import (
    Tiles,
    accumulation_dtype,
    index_type,
    level_strides,
    locate_tile,
    over_planes,
    pixels_of,
    store,
    strided,
    tiles_of,
)
from .sums import add_parts, new_partial

CHUNK = 16  # channels that are mixed at a time
PIXELS = 16  # likewise, pixels
MOST_PARTS = 128  # of what mix_backward sums


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x, or as large as there must be; it may be on the meta device."""
    for recursive in (1, 2, 3):
        batch, channels, height, width = x.shape
        least, k = 4**recursive, x
        if min(height, width) < least:
            k = x.new_empty(batch, channels, max(height, least), max(width, least))
        cells = batch * channels * (k.shape[2] // least) * (k.shape[3] // least)
        maps = k.new_empty(cells * (1 + (16**recursive - 1) // 15), dtype=accumulation_dtype(k.dtype))
        agg, dw, pw, bias = (k.new_empty(channels, *of) for of in [(1, 4, 4), (1, 3, 3), (channels, 1, 1), ()])
        y, parameters, options = torch.empty_like(k), (agg, bias, dw, bias, pw, bias), f"recursive {recursive}"
        yield from named("forward", forward(y, maps, k, *parameters, recursive), options)
        yield from named("backward", backward(y, *parameters, y, maps, k, *parameters, recursive), options)


# What is launched


def forward(y, maps, k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive) -> Iterator[Launch]:
    if k.numel() == 0:
        return
    *levels, activated = levels_of(maps, k, recursive)
    for level in range(0, recursive, 2):
        one, two = levels[level + 1], levels[level + 2] if level + 2 <= recursive else None
        images = dict(one=one, two=two, activated=activated if level + 2 >= recursive else None)
        options = dict(weight=weight_agg, bias=bias_agg, batch=len(k), height=one.shape[2], width=one.shape[3])
        options |= dict(OF_A_LEVEL=level > 0, OF_SIDES=4 ** (recursive - level - 1))
        images |= strided(x=levels[level]) if level == 0 else dict(x=levels[level], x_strides=None)
        yield over_planes(aggregate, one, patches_of(one), images | options)
    mixed = new_level(activated)
    parameters = dict(weight_dw=weight_dw, bias_dw=bias_dw, weight_pw=weight_pw, bias_pw=bias_pw)
    yield over_pixels(mix, activated, dict(mixed=mixed, x=activated) | parameters)
    between = new_between(activated, k)
    yield stretching(between, mixed, is_level=True, vertical=False)
    yield stretching(y, between, k, vertical=True)


def backward(
    dk, dweight_agg, dbias_agg, dweight_dw, dbias_dw, dweight_pw, dbias_pw, dy, maps, k,
    weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive,
) -> Iterator[Launch]:  # fmt: skip
    gradients_agg, gradients_mix = [dweight_agg, dbias_agg], [dweight_dw, dbias_dw, dweight_pw, dbias_pw]
    *levels, activated = levels_of(maps, k, recursive)
    steps = [(level, max(level - 2, 0)) for level in range(recursive, 0, -2)] if k.numel() else []  # from .. to
    parts = [len(k) * spread_patches(levels[to]).of_a_plane for _, to in steps]
    partial_agg = new_partial(sum(parts), gradients_agg)
    partial_mix = new_partial(mix_parts(activated), gradients_mix)
    if k.numel():
        between = new_between(activated, k)
        dmixed, gradient = new_level(activated), new_level(activated)
        yield gathering(between, dy, vertical=True)
        yield gathering(dmixed, between, is_level=True, vertical=False)
        images = dict(dunmixed=gradient, dmixed=dmixed, x=activated)
        parameters = dict(weight_dw=weight_dw, bias_dw=bias_dw, weight_pw=weight_pw)
        yield over_pixels(mix_backward, activated, images | parameters | dict(partial=partial_mix))
    for (level, to), partial in zip(steps, partial_agg.split(parts), strict=True):
        x, dx, one = levels[to], new_level(levels[to]) if to else dk, levels[to + 1]
        images = dict(dx=dx, dy=None if to else dy, x=x, one=one if level == to + 2 else None)
        images |= dict(gradient=gradient, s=levels[level] if level == recursive else None)
        options = dict(weight=weight_agg, weight_dw=weight_dw, partial=partial)
        options |= dict(height=x.shape[2], width=x.shape[3], one_height=one.shape[2], one_width=one.shape[3])
        # Left to itself, ptxas of Triton 3.6 spills two registers for more warps at a time (bfloat16, sm_100).
        yield over_planes(spread, x, spread_patches(x), strided(**images) | options, maxnreg=255)
        gradient = dx
    yield add_parts(gradients_agg, partial_agg)
    yield add_parts(gradients_mix, partial_mix)


calibrate, calibrate_backward = launched(forward), launched(backward)


def levels_of(maps: Tensor, k: Tensor, recursive: int) -> list[Tensor]:
    """Return k, level 1, 2, .. `recursive`, and the last one after GELU."""
    batch, channels, height, width = k.shape
    levels, first = [k], 0
    for level in (*range(1, recursive + 1), recursive):
        rows, columns = ((side >> 2 * recursive) << 2 * (recursive - level) for side in (height, width))
        size = channels, batch, rows, columns
        levels.append(maps[first : first + math.prod(size)].view(size).transpose(0, 1))
        first += math.prod(size)
    return levels


def new_level(like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return like.new_empty((channels, batch, height, width)).transpose(0, 1)


def patches_of(one: Tensor) -> Tiles:
    """Return tiles of a level, whatever its size: whole 4x4 patches that the next one sees.

    A thread reads 8 pixels of 4 rows.
    """
    return tiles_of(*one.shape[2:], most=256, each=2, widest=16, least=16)


def spread_patches(x: Tensor) -> Tiles:
    """Return tiles of the level behind x, as if it had every last pixel of x, too."""
    return tiles_of(*(cdiv(side, 4) for side in x.shape[2:]), most=512, each=2, widest=32, least=4)


def new_between(level: Tensor, k: Tensor) -> Tensor:
    """Return room for what has as many rows as a level, and as many columns as k."""
    return new_image(k[:, :, : level.shape[2]], k.shape[1], level.dtype)


def over_pixels(kernel, level: Tensor, arguments: dict) -> Launch:
    """Describe a launch that mixes channels of some pixels at a time."""
    batch, channels, height, width = level.shape
    pixels, chunks = batch * height * width, cdiv(channels, CHUNK)
    sizes = dict(channels=channels, height=height, width=width, pixels=pixels)
    options = dict(CHUNK=CHUNK, PIXELS=PIXELS, INDEX=index_type(pixels + PIXELS))
    programs = cdiv(pixels, PIXELS) * chunks
    if "partial" in arguments:
        parts = mix_parts(level)
        options, programs = options | dict(parts=parts), parts * chunks**2
    # Left to itself, ptxas spills some registers for more warps at a time (64 channels, sm_80).
    return Launch(kernel, programs, arguments | sizes | options, num_warps=4, more_options={"maxnreg": 255})


def mix_parts(level: Tensor) -> int:
    return min(MOST_PARTS, cdiv(level.numel() // level.shape[1], PIXELS)) if level.numel() else 0


# Kernels


@triton.jit(do_not_specialize=["channels", "batch", "height", "width"])
def aggregate(
    x, x_strides, one, two, activated, weight, bias, channels, batch, height, width,
    OF_A_LEVEL: tl.constexpr, OF_SIDES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write level one (height, width), level two unless it is None, and the last of them after GELU, likewise.

    x is k, or a level, which GELU comes behind. OF_SIDES is a divisor of level one's height and width.
    """
    WIDE: tl.constexpr = one.dtype.element_ty
    height, width = height // OF_SIDES * OF_SIDES, width // OF_SIDES * OF_SIDES  # so that the compiler knows it
    one_strides, two_strides = level_strides(batch, height, width), level_strides(batch, height // 4, width // 4)
    activated_strides = one_strides if two is None else two_strides
    if OF_A_LEVEL:
        x_strides = level_strides(batch, height * 4, width * 4)
    image, channel, _, line, column = locate_tile(channels, height, width, LINES, COLUMNS)
    row = line + tl.arange(0, LINES)[:, None]
    seen_column = column * 4 + tl.arange(0, COLUMNS * 4)[None, :]
    inside = (row < height) & (seen_column < width * 4)
    x_at = pixels_of(x, x_strides, image, channel, row * 4, seen_column)
    taps = weight + channel * 16
    total = tl.zeros((LINES, COLUMNS * 4), WIDE)
    for i in tl.static_range(4):
        seen = tl.load(x_at + i * x_strides[2], mask=inside, other=0).to(WIDE)
        if OF_A_LEVEL:
            seen = activate(seen, "gelu", WIDE)
        total += seen * tl.load(taps + (4 * i + seen_column % 4)).to(WIDE)
    shift = tl.load(bias + channel).to(WIDE)
    s = tl.sum(tl.reshape(total, (LINES, COLUMNS, 4)), axis=2) + shift
    column_one = column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column_one < width)
    tl.store(pixels_of(one, one_strides, image, channel, row, column_one), s, mask=inside)
    if two is not None:
        total = activate(s, "gelu", WIDE) * tl.load(taps + (row % 4 * 4 + column_one % 4)).to(WIDE)
        s = tl.sum(tl.sum(tl.reshape(total, (LINES // 4, 4, COLUMNS // 4, 4)), axis=3), axis=1) + shift
        row = line // 4 + tl.arange(0, LINES // 4)[:, None]
        column_one = column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        inside = (row < height // 4) & (column_one < width // 4)
        tl.store(pixels_of(two, two_strides, image, channel, row, column_one), s, mask=inside)
    if activated is not None:
        to = pixels_of(activated, activated_strides, image, channel, row, column_one)
        tl.store(to, activate(s, "gelu", WIDE), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "pixels"])
def mix(
    mixed, x, weight_dw, bias_dw, weight_pw, bias_pw, channels, height, width, pixels,
    CHUNK: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """mixed = weight_pw @ (depthwise 3x3 of x) + bias_pw, for some pixels and some of the channels."""
    WIDE: tl.constexpr = x.dtype.element_ty
    chunks = tl.cdiv(channels, CHUNK)
    pixel = (tl.program_id(0) // chunks).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    out = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK, PIXELS), WIDE)
    for first in range(0, channels, CHUNK):
        channel = first + tl.arange(0, CHUNK)
        unmixed = depthwise_of(x, weight_dw, bias_dw, channel, pixel, channels, height, width, pixels)
        square = weight_pw + out[:, None] * channels + channel[None, :]
        inside = (out < channels)[:, None] & (channel < channels)[None, :]
        total = tl.dot(tl.load(square, mask=inside, other=0).to(WIDE), unmixed, total, input_precision="ieee")
    total += tl.load(bias_pw + out, mask=out < channels, other=0).to(WIDE)[:, None]
    inside = (out < channels)[:, None] & (pixel < pixels)[None, :]
    tl.store(mixed + out.to(tl.int64)[:, None] * pixels + pixel[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["height", "width", "parts"])
def mix_backward(
    dunmixed, dmixed, x, weight_dw, bias_dw, weight_pw, partial, channels, height, width, pixels, parts,
    CHUNK: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A square of weight_pw's gradient, over a part of the pixels; in the first row of squares all the others, too.

    partial is (parts, 9 C + C + C C + C): of weight_dw, bias_dw, weight_pw and bias_pw.
    """
    WIDE: tl.constexpr = x.dtype.element_ty
    part, square, chunks = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.cdiv(channels, CHUNK)
    out = square // chunks * CHUNK + tl.arange(0, CHUNK)
    channel = square % chunks * CHUNK + tl.arange(0, CHUNK)
    is_out, is_channel = out < channels, channel < channels
    tap = tl.arange(0, 16)[None, :]
    matrix_sum, bias_sum = tl.zeros((CHUNK, CHUNK), WIDE), tl.zeros((CHUNK,), WIDE)
    tap_sums = tl.zeros((CHUNK, 16), WIDE)  # of weight_dw, then bias_dw
    for tile in range(part, tl.cdiv(pixels, PIXELS), parts):
        pixel = tl.full((), PIXELS, INDEX) * tile + tl.arange(0, PIXELS)
        exists = (pixel < pixels)[None, :]
        to_out = dmixed + out.to(tl.int64)[:, None] * pixels + pixel[None, :]
        gradient = tl.load(to_out, mask=is_out[:, None] & exists, other=0)
        unmixed = depthwise_of(x, weight_dw, bias_dw, channel, pixel, channels, height, width, pixels)
        matrix_sum = tl.dot(gradient, tl.trans(unmixed), matrix_sum, input_precision="ieee")
        bias_sum += tl.sum(gradient, axis=1)
        if square < chunks:
            gradient = tl.zeros((CHUNK, PIXELS), WIDE)
            for first in range(0, channels, CHUNK):
                other = first + tl.arange(0, CHUNK)
                is_other = other < channels
                to_other = dmixed + other.to(tl.int64)[:, None] * pixels + pixel[None, :]
                dother = tl.load(to_other, mask=is_other[:, None] & exists, other=0)
                square_at = weight_pw + other[None, :] * channels + channel[:, None]
                transposed = tl.load(square_at, mask=is_channel[:, None] & is_other[None, :], other=0).to(WIDE)
                gradient = tl.dot(transposed, dother, gradient, input_precision="ieee")
            here = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
            inside = is_channel[:, None] & exists
            tl.store(dunmixed + here, gradient, mask=inside)
            row, column = (pixel // width % height)[None, :], (pixel % width)[None, :]
            for n in tl.static_range(9):
                seen = load_tap(x + here, n // 3 - 1, n % 3 - 1, inside, row, column, height, width)
                tap_sums += tl.where(tap == n, tl.sum(gradient * seen, axis=1)[:, None], 0)
            tap_sums += tl.where(tap == 9, tl.sum(gradient, axis=1)[:, None], 0)
    sums = partial + part.to(tl.int64) * (channels * (channels + 11))
    if square < chunks:
        to = sums + tl.where(tap < 9, channel[:, None] * 9 + tap, channels * 9 + channel[:, None])
        tl.store(to, tap_sums, mask=is_channel[:, None] & (tap < 10))
    sums += channels * 10
    tl.store(sums + out[:, None] * channels + channel[None, :], matrix_sum, mask=is_out[:, None] & is_channel[None, :])
    if square % chunks == 0:
        tl.store(sums + channels * channels + out, bias_sum, mask=is_out)


@triton.jit
def spread(
    dx, dx_strides, dy, dy_strides, x, x_strides, one, one_strides, gradient, gradient_strides, s, s_strides,
    weight, weight_dw, partial, channels, height, width, one_height, one_width,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx (height, width) = the transposed aggregation of level one's gradient, and weight_agg's and bias_agg's sums.

    x is k, then dy is added, or a level. `gradient` is level one's; or, unless `one` is None, that of level two, which
    is spread to level one first. It is that of depthwise 3x3's result, unless s is None: then it is still to be
    brought through that and through GELU of s. partial is (parts, 16 C + C).
    """
    WIDE: tl.constexpr = gradient.dtype.element_ty
    lines, columns = tl.cdiv(height, 4), tl.cdiv(width, 4)
    batch, channel, part, line, column = locate_tile(channels, lines, columns, LINES, COLUMNS)
    taps = weight + channel * 16
    row, column_one = line + tl.arange(0, LINES)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    images = gradient, gradient_strides, s, s_strides
    second_sums, bias_sum = tl.zeros((4, 4), WIDE), tl.zeros((), WIDE)
    if one is None:
        found = gradient_of(images, weight_dw, batch, channel, row, column_one, one_height, one_width)
    else:
        row_two = line // 4 + tl.arange(0, LINES // 4)[:, None]
        column_two = column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        two = gradient_of(images, weight_dw, batch, channel, row_two, column_two, one_height // 4, one_width // 4)
        bias_sum += tl.sum(two)
        two = tl.broadcast_to(two[:, None, :, None], (LINES // 4, 4, COLUMNS // 4, 4))
        one_at = pixels_of(one, one_strides, batch, channel, row, column_one)
        s_one = tl.load(one_at, mask=(row < one_height) & (column_one < one_width), other=0)
        activated, slope = activate_with_slope(s_one, "gelu", WIDE)
        second_sums += tl.sum(tl.sum(two * tl.reshape(activated, two.shape), axis=2), axis=0)
        weight_one = tl.load(taps + (row % 4 * 4 + column_one % 4)).to(WIDE)
        found = weight_one * slope * tl.reshape(two, (LINES, COLUMNS))
    bias_sum += tl.sum(found)
    found = tl.reshape(tl.broadcast_to(found[:, :, None], (LINES, COLUMNS, 4)), (LINES, COLUMNS * 4))

    column = column * 4 + tl.arange(0, COLUMNS * 4)[None, :]
    dx_at = pixels_of(dx, dx_strides, batch, channel, row * 4, column)
    x_at = pixels_of(x, x_strides, batch, channel, row * 4, column)
    is_seen = (row < one_height) & (column < one_width * 4)
    sums = partial + part.to(tl.int64) * (17 * channels)
    for i in tl.static_range(4):
        inside = (row * 4 + i < height) & (column < width)
        seen = tl.load(x_at + i * x_strides[2], mask=is_seen, other=0).to(WIDE)
        change = found * tl.load(taps + (4 * i + column % 4)).to(WIDE)
        if dy is None:
            seen, slope = activate_with_slope(seen, "gelu", WIDE)
            change *= slope
        else:
            dy_at = pixels_of(dy, dy_strides, batch, channel, row * 4 + i, column)
            change += tl.load(dy_at, mask=inside, other=0).to(WIDE)
        store(dx_at + i * dx_strides[2], change, inside)
        tap_sums = tl.sum(tl.reshape(found * seen, (LINES * COLUMNS, 4)), axis=0)
        tap_sums += tl.sum(tl.where(tl.arange(0, 4)[:, None] == i, second_sums, 0), axis=0)
        tl.store(sums + channel * 16 + 4 * i + tl.arange(0, 4), tap_sums)
    tl.store(sums + channels * 16 + channel, bias_sum)


# What they are made of


@triton.jit
def load_tap(pixel, DOWN: tl.constexpr, RIGHT: tl.constexpr, inside, row, column, height, width):
    """Return what lies so far down and to the right of pixels at (row, column) of a level; 0 for none."""
    there, beside = row + DOWN, column + RIGHT
    exists = inside & (there >= 0) & (there < height) & (beside >= 0) & (beside < width)
    return tl.load(pixel + (DOWN * width + RIGHT), mask=exists, other=0)


@triton.jit
def depthwise_of(x, weight, bias, channel, pixel, channels, height, width, pixels):
    """Return depthwise 3x3 of channels (M,) at pixels (N,) of a level: (M, N)."""
    is_channel = channel < channels
    inside = is_channel[:, None] & (pixel < pixels)[None, :]
    here = x + channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    row, column = (pixel // width % height)[None, :], (pixel % width)[None, :]
    total = tl.where(inside, tl.load(bias + channel, mask=is_channel, other=0).to(x.dtype.element_ty)[:, None], 0)
    for n in tl.static_range(9):
        factor = tl.load(weight + channel * 9 + n, mask=is_channel, other=0).to(total.dtype)
        total += factor[:, None] * load_tap(here, n // 3 - 1, n % 3 - 1, inside, row, column, height, width)
    return total


@triton.jit
def gradient_of(images, weight_dw, batch, channel, row, column, height, width):
    """Return `gradient` at pixels of a level; see `spread`."""
    gradient, gradient_strides, s, s_strides = images
    inside = (row < height) & (column < width)
    here = pixels_of(gradient, gradient_strides, batch, channel, row, column)
    if s is None:
        return tl.load(here, mask=inside, other=0)
    else:
        total = tl.zeros(inside.shape, gradient.dtype.element_ty)
        for n in tl.static_range(9):
            factor = tl.load(weight_dw + channel * 9 + (8 - n)).to(total.dtype)
            total += factor * load_tap(here, n // 3 - 1, n % 3 - 1, inside, row, column, height, width)
        s_at = pixels_of(s, s_strides, batch, channel, row, column)
        _, slope = activate_with_slope(tl.load(s_at, mask=inside, other=0), "gelu", total.dtype)
        return total * slope

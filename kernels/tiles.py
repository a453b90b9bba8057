"""Pixels with all their channels, in tiles whose sides are powers of two, as tl.dot wants them.

A program holds PIXELS pixels of one image: a tuple of tiles (PIXELS, TILES[i]), where the TILES cover the channels, 36
as 16 + 16 + 16. What lies beyond the channels is zero. A layer goes over blocks of its results in a loop, `made`
(columns,), so that the registers hold the weights of one block: block = sum over i of tl.dot(x[i], matrix[i]).

Sums are float32. Factors of tl.dot are rounded to the dtype of the images. Those of float32 are multiplied in three
products of TF32, which keep 22 bits of each, or in one where torch allows TF32 for convolutions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.planes import UNIT, has_room, new_packed
from .configurations import configuration
from .integers import cdiv, round_up
from .launch import Launch
from .rounding import INTERPRETED, round_to
from .strided import index_type

# On the host


def cut(channels: int) -> tuple[int, ...]:
    """Return equal powers of two that cover the channels: 36 -> (16, 16, 16), 64 -> (32, 32)."""
    width = 32 if cdiv(channels, 32) * 2 == cdiv(channels, 16) else 16
    return (width,) * cdiv(channels, width)


def powers(channels: int) -> tuple[int, ...]:
    """Return powers of two that cover the channels: 36 -> (32, 16), 64 -> (32, 32), 72 -> (32, 32, 16).

    They are the rows of sums over pixels, 32 at most: Triton multiplies 64 rows by the matrix units of warp groups.
    """
    whole, rest = divmod(channels, 32)
    return (32,) * whole + ((16,) if 0 < rest <= 16 else (32,) * (rest > 16))


def precision(dtype: torch.dtype) -> str:
    """Return how tl.dot multiplies factors of a dtype: float32 by TF32 where torch allows that for convolutions.

    What does not depend on torch's switch is not compiled again for it: 16-bit factors have one answer.
    """
    # The only switch that follows both torch's old and new ones; reading allow_tf32 raises after the new ones are set.
    is_allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and is_allowed else "tf32x3"


def pixels_of(*images: Tensor) -> dict:
    """Return the arguments `pixels` of an image and `width`: None where in all images row follows on row."""
    height, width = images[0].shape[2:]
    follow = height == 1 or all(image.stride(2) == width * image.stride(3) for image in images)
    return dict(pixels=height * width, width=None if follow else width)


def over_tiles(kernel, name: str, images: list[Tensor], arguments: dict) -> Launch:
    """Describe a launch with one program per tile of pixels; `images` are all that it reads and writes but workspaces.

    `name` is that of its configuration, which goes by the last of them.
    """
    pixels, *how = configuration(name, images[-1])
    places = pixels_of(*images)
    index = index_type(places["pixels"] + pixels)
    programs = len(images[0]) * cdiv(places["pixels"], pixels)
    if places["width"] is None:
        arguments = without_rows(arguments, images)
    # Up to a multiple of ROOM, pixels behind a plane may be read and written: so no mask depends on the size, and loads
    # are 16 bytes wide whatever it is.
    room = UNIT if all(map(has_room, images)) else 1
    return launch(kernel, programs, arguments | places | dict(PIXELS=pixels, ROOM=room, INDEX=index), *how)


def without_rows(arguments: dict, images: list[Tensor]) -> dict:
    """Return the arguments without the strides of rows that follow each other: not read, they would be specialised."""
    strides = {f"{name}_strides" for name, value in arguments.items() if any(value is image for image in images)}
    return {name: (*value[:2], 0, value[3]) if name in strides else value for name, value in arguments.items()}


def launch(kernel, programs: int, arguments: dict, warps: int, stages: int, registers: int) -> Launch:
    """Describe a launch with the configuration of a kernel, all but its pixels."""
    options = {"num_stages": stages} | ({"maxnreg": registers} if registers else {})
    return Launch(kernel, programs, arguments, warps, options)


def workspace(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return room for images like x, channels innermost; pixels start at multiples of 16 elements, for wide loads."""
    return new_packed(x, channels, dtype, round_up(channels, UNIT))


# In kernels: where


@triton.constexpr_function
def start(tiles, i):
    """Return the first channel of tile i."""
    return sum(tiles[:i])


@triton.jit
def channels_of(TILES: tl.constexpr, i: tl.constexpr):
    return start(TILES, i) + tl.arange(0, TILES[i])


@triton.jit
def tile_of(program, pixels, PIXELS, INDEX: tl.constexpr):
    """Return the image of a program and the first of its PIXELS pixels."""
    tiles = (pixels + PIXELS - 1) // PIXELS
    return program // tiles, (program % tiles).to(INDEX) * PIXELS


@triton.jit
def locate_pixels(pixels, PIXELS: tl.constexpr, ROOM: tl.constexpr, INDEX: tl.constexpr):
    """Return a program's image, its PIXELS pixels, and which of them are read and written (`over_tiles`)."""
    image, first = tile_of(tl.program_id(0), pixels, PIXELS, INDEX)
    pixel = first + tl.arange(0, PIXELS)
    return image, pixel, pixel < (pixels + ROOM - 1) // ROOM * ROOM


@triton.jit
def address(image, strides, batch, pixel, width):
    """Return pointers (PIXELS,) to channel 0; offsets are 64-bit."""
    first = image + tl.full((), 1, tl.int64) * batch * strides[0]
    if width is None:
        return first + pixel.to(tl.int64) * strides[3]
    else:
        row, column = pixel // width, pixel % width
        return first + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


# In kernels: loading and storing


@triton.jit
def load_tile(pointers, strides, inside, channel, CHANNELS: tl.constexpr):
    """Return some channels of pixels, of the image's dtype and zero where not `inside`."""
    there = inside[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(pointers[:, None] + channel.to(tl.int64)[None, :] * strides[1], mask=there, other=0)


@triton.jit
def load_pixels(pointers, strides, inside, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return all channels of pixels."""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles += (load_tile(pointers, strides, inside, channels_of(TILES, i), CHANNELS),)
    return tiles


@triton.jit
def store_tile(pointers, strides, inside, tile, channel, CHANNELS: tl.constexpr):
    """Write some channels of pixels, rounded to the image's dtype."""
    there = inside[:, None] & (channel < CHANNELS)[None, :]
    at_channel = pointers[:, None] + channel.to(tl.int64)[None, :] * strides[1]
    tl.store(at_channel, round_to(tile, pointers.dtype.element_ty), mask=there)


@triton.jit
def store_pixels(pointers, strides, inside, tiles, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Write all channels of pixels."""
    for i in tl.static_range(len(TILES)):
        store_tile(pointers, strides, inside, tiles[i], channels_of(TILES, i), CHANNELS)


@triton.jit
def load_row(values, channel, CHANNELS: tl.constexpr):
    """Return some values of a parameter (CHANNELS,) in float32, as a row (1, columns)."""
    return tl.load(values + channel, mask=channel < CHANNELS, other=0).to(tl.float32)[None, :]


@triton.jit
def load_columns(
    matrix, row_stride, column_stride, column, HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Return some columns of a matrix (HEIGHT, WIDTH) as tiles (ROWS[i], columns)."""
    tiles = ()
    for i in tl.static_range(len(ROWS)):
        row = channels_of(ROWS, i)
        there = (row < HEIGHT)[:, None] & (column < WIDTH)[None, :]
        tiles += (tl.load(matrix + row[:, None] * row_stride + column[None, :] * column_stride, mask=there, other=0),)
    return tiles


# In kernels: arithmetic


@triton.jit
def round_all(tiles, dtype: tl.constexpr):
    out = ()
    for i in tl.static_range(len(tiles)):
        out += (tiles[i] if tiles[i].dtype == dtype else round_to(tiles[i].to(tl.float32), dtype),)
    return out


# An item of a constexpr tuple is a number to Triton 3.6, which wants a constexpr in a shape: an argument is one again.


@triton.jit
def zero_row(columns: tl.constexpr):
    return tl.zeros((columns,), tl.float32)


@triton.jit
def zero_tile(rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.float32)


@triton.jit
def zeros(rows: tl.constexpr, TILES: tl.constexpr):
    """Return float32 tiles (rows, TILES[i])."""
    out = ()
    for i in tl.static_range(len(TILES)):
        out += (zero_tile(rows, TILES[i]),)
    return out


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr):
    """sum + a @ b; a and b are of one dtype, sum is float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def multiply(x, matrix, sums, PRECISION: tl.constexpr):
    """Return sums + x @ matrix, one block; sums are (PIXELS, columns) or a row."""
    total = tl.broadcast_to(sums, (x[0].shape[0], sums.shape[1]))
    for i in tl.static_range(len(x)):
        total = dot(x[i], matrix[i], total, PRECISION)
    return total


@triton.jit
def multiply_block(block, matrix, sums, PRECISION: tl.constexpr):
    """Return the tiles sums + block @ matrix, what one block of a sum gives; matrix[i] is (columns, TILES[i])."""
    out = ()
    for i in tl.static_range(len(sums)):
        out += (dot(block, matrix[i], sums[i], PRECISION),)
    return out


@triton.jit
def transposed(tiles):
    out = ()
    for i in tl.static_range(len(tiles)):
        out += (tl.trans(tiles[i]),)
    return out


@triton.jit
def add_tiles(tiles):
    """Return the sum of equal tiles."""
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    return total


@triton.jit
def add(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out += (a[i].to(tl.float32) + b[i].to(tl.float32),)
    return out


@triton.jit
def product(a, b):
    """Return the products of tiles, which are to be summed over the channels.

    One tile's are rounded by themselves: fused with the first sum over lanes, they would differ from lane to lane.
    """
    out = ()
    for i in tl.static_range(len(a)):
        if INTERPRETED or len(a) > 1:
            out += (a[i] * b[i],)
        else:
            asm: tl.constexpr = "mul.rn.f32 $0, $1, $2;"
            out += (tl.inline_asm_elementwise(asm, "=f,f,f", [a[i], b[i]], dtype=tl.float32, is_pure=True, pack=1),)
    return out


@triton.jit
def sum_both(a, b):
    """Return the sums of two tiles (PIXELS, channels) over the channels, both (PIXELS, 1), by one reduction."""
    sums = tl.sum(tl.join(a, b), axis=1)
    a, b = tl.split(sums)
    return a[:, None], b[:, None]


# In kernels: LayerNorm


@triton.jit
def normalise(x, eps, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return n = (x - mean) / sigma as float32 tiles, and 1 / sigma (PIXELS, 1). Tiles are equal."""
    wide = ()
    for i in tl.static_range(len(TILES)):
        wide += (x[i].to(tl.float32),)
    mean = tl.sum(add_tiles(wide), axis=1, keep_dims=True) * (1 / CHANNELS)
    centred = ()
    for i in tl.static_range(len(TILES)):
        centred += (tl.where((channels_of(TILES, i) < CHANNELS)[None, :], wide[i] - mean, 0),)
    # What the mean was rounded by, which is not small beside sigma if the mean is large.
    rest, square = sum_both(add_tiles(centred), add_tiles(product(centred, centred)))
    rest *= 1 / CHANNELS
    scale = 1 / tl.sqrt(square * (1 / CHANNELS) - rest * rest + eps)
    n = ()
    for i in tl.static_range(len(TILES)):
        n += (tl.where((channels_of(TILES, i) < CHANNELS)[None, :], (centred[i] - rest) * scale, 0),)
    return n, scale


@triton.jit
def normalise_backward(dn, n, scale, CHANNELS: tl.constexpr):
    """Return dx of `normalise` as float32 tiles; dn is zero beyond the channels."""
    along, across = sum_both(add_tiles(dn), add_tiles(product(dn, n)))
    out = ()
    for i in tl.static_range(len(dn)):
        out += (scale * (dn[i] - along * (1 / CHANNELS) - n[i] * (across * (1 / CHANNELS))),)
    return out


@triton.jit
def affine(n, gain, shift, dtype: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return gain * n + shift rounded to dtype, or n where there is no norm: gain and shift are None."""
    out = ()
    for i in tl.static_range(len(TILES)):
        tile = n[i]
        if gain is not None:
            channel = channels_of(TILES, i)
            tile = tile * load_row(gain, channel, CHANNELS) + load_row(shift, channel, CHANNELS)
        out += (tile,)
    return round_all(out, dtype)


@triton.jit
def times_row(tiles, values, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return the tiles times a parameter (CHANNELS,)."""
    out = ()
    for i in tl.static_range(len(TILES)):
        out += (tiles[i] * load_row(values, channels_of(TILES, i), CHANNELS),)
    return out

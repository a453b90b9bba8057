"""Dense 3x3 convolutions as products of matrices, of images whose channels lie innermost without gaps ("packed").

In a packed image, a pixel and its two neighbours in a line are 3 * CHANNELS values in a row, its window; three lines
make 9 * CHANNELS. A convolution multiplies the windows of PIXELS pixels, line by line, cut into tiles (PIXELS,
WINDOW[j]) whose widths are powers of two: 108 are 64 + 32 + 16, so that the matrix units sum over 112. Around the image
is zero.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .configurations import configuration
from .integers import cdiv
from .launch import Launch
from .products import steps_of
from .strided import index_type, strided

# On the host


def is_packed(x: Tensor) -> bool:
    _, channels, height, width = x.shape
    of_three = zip((channels, height, width), x.stride()[1:], (1, width * channels, channels), strict=True)
    return all(size == 1 or stride == expected for size, stride, expected in of_three)


def pack(n: Tensor, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 0.0) -> Launch:
    """Describe the launch that writes n, packed: LN(x), or x where there is no norm."""
    sizes = dict(gain=gain, shift=shift, eps=eps, CHANNELS=x.shape[1], TILES=t.cut(x.shape[1]))
    return t.over_tiles(pack_pixels, "norm_conv3x3 pack", [x], dict(n=n, n_stride=n.stride(0)) | strided(x=x) | sizes)


def columns_of(weight: Tensor) -> Tensor:
    """Return weight (D, C, 3, 3) as a matrix (3, 3C, D): for each line, its window's elements; made at every call."""
    return weight.permute(2, 3, 1, 0).reshape(3, -1, len(weight)).contiguous()


def convolution(n: Tensor, weight: Tensor) -> dict:
    """Return as the kernels' arguments a packed image and the columns of the weight that it is convolved with."""
    _, channels, height, width = n.shape
    images = dict(n=n, n_stride=n.stride(0), columns=weight, lines=height, line=width)
    made = weight.shape[2]
    window, turns = turns_of(3 * channels, n.element_size())
    sizes = dict(CHANNELS=channels, WINDOW=window, TURNS=turns, OUT_CHANNELS=made, MADE=t.cut(made))
    return images | sizes | dict(PRECISION=t.precision(n.dtype))


def turns_of(width: int, size: int) -> tuple[tuple[int, ...], int]:
    """Return the tiles of a window that are multiplied at a time, and how many times, with the least waste.

    More would not fit the registers: those of float32 hold the parts of each factor that TF32 multiplies.
    """
    choices = []
    for turns in range(1, cdiv(width, 16) + 1):
        some = 16 * cdiv(width, 16 * turns)
        choices.append((tuple(tile for tile in (128, 64, 32, 16) if some & tile), turns))
    most = 112 if size == 2 else 16
    return min((c for c in choices if sum(c[0]) <= most), key=lambda choice: sum(choice[0]) * choice[1])


def chunk_of(channels: int) -> int:
    """Return how many of the 9 * channels that three windows have a program of `window_products` takes."""
    return min((128, 64), key=lambda width: width * cdiv(9 * channels, width))


def steps_of_windows(n: Tensor) -> int:
    """Return how many tiles of pixels a program goes over: more, because several share each part of the pixels."""
    return cdiv(9 * n.shape[1], chunk_of(n.shape[1])) * steps_of(n, "norm_conv3x3 products")


def window_parts(n: Tensor) -> int:
    """Return how many parts of the pixels `window_products` sums over, each with a row of partial sums."""
    tile = configuration("norm_conv3x3 products", n).pixels
    return len(n) * cdiv(n.shape[2] * n.shape[3], tile * steps_of_windows(n))


def window_products(partial: Tensor, ds: Tensor, n: Tensor) -> Launch:
    """Describe the launch that writes partial, rows of sums of dweight (D, 9C) and dbias (D,); images are packed."""
    assert len(partial) == window_parts(n), f"partial has {len(partial)} rows: not made for n, {n.dtype}"
    pixels, *how = configuration("norm_conv3x3 products", n)
    _, channels, height, width = n.shape
    images = dict(partial=partial, ds=ds, ds_stride=ds.stride(0), n=n, n_stride=n.stride(0))
    sizes = dict(pixels=height * width, lines=height, line=width, steps=steps_of_windows(n))
    tiles = dict(CHANNELS=channels, CHUNK=chunk_of(channels), OUT_CHANNELS=ds.shape[1], MADE=t.powers(ds.shape[1]))
    options = dict(PIXELS=pixels, INDEX=index_type(height * width + 2**16), PRECISION=t.precision(n.dtype))
    programs = len(partial) * cdiv(9 * channels, tiles["CHUNK"])
    return t.launch(add_window_products, programs, images | sizes | tiles | options, *how)


# Kernels


@triton.jit(do_not_specialize=["pixels", "width"])
def pack_pixels(
    n, n_stride, x, x_strides, gain, shift, eps, pixels, width,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, PIXELS: tl.constexpr, ROOM: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """n = LN(x), or x, packed; PIXELS pixels of an image."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, TILES)
    if gain is not None:
        seen, _ = t.normalise(seen, eps, CHANNELS, TILES)
    seen = t.affine(seen, gain, shift, n.dtype.element_ty, CHANNELS, TILES)
    store_packed(image_of(n, n_stride, image), pixel, inside, seen, CHANNELS, TILES)


@triton.jit(do_not_specialize=["lines", "line", "steps"])
def add_window_products(
    partial, ds, ds_stride, n, n_stride, pixels, lines, line, steps,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[part] = sums over pixels of transposed ds @ windows, a chunk of all three lines, and of ds.

    They are written as dweight (D, C, 3, 3) and dbias (D,) lie in memory.

    One wide tile of windows: Triton shares out columns among the warps then; of several, each warp gets all columns.
    """
    WIDTH: tl.constexpr = 9 * CHANNELS
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    part, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    down = k // (3 * CHANNELS) - 1
    column = k // CHANNELS - 3 * (down + 1)  # without %, by which Triton loses sight of what lies side by side
    offset = (down.to(tl.int64) * (line - 3) - 4) * CHANNELS + k
    sums, dbias = (), ()
    for i in tl.static_range(len(MADE)):
        sums += (t.zero_tile(MADE[i], CHUNK),)
        dbias += (t.zero_row(MADE[i]),)
    image, start = t.tile_of(part, pixels, PIXELS * steps, INDEX)
    ds, n = image_of(ds, ds_stride, image), image_of(n, n_stride, image)
    for step in tl.range(0, steps, disable_licm=True):
        pixel = start + step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        gradient = load_packed(ds, pixel, inside, OUT_CHANNELS, MADE)
        row, first, end = around(pixel, inside, line)
        there = (column[None, :] >= first[:, None]) & (column[None, :] < end[:, None]) & (k < WIDTH)[None, :]
        above = row[:, None] + down[None, :]
        there &= (above >= 0) & (above < lines)
        pointers = n + pixel.to(tl.int64) * CHANNELS
        seen = tl.load(pointers[:, None] + offset[None, :], mask=there, other=0)
        sums_before, dbias_before = sums, dbias
        sums, dbias = (), ()
        for i in tl.static_range(len(MADE)):
            sums += (t.dot(tl.trans(gradient[i]), seen, sums_before[i], PRECISION),)
            dbias += (dbias_before[i] + tl.sum(gradient[i].to(tl.float32), axis=0),)
    partial += part.to(tl.int64) * (OUT_CHANNELS * (WIDTH + 1))
    for i in tl.static_range(len(MADE)):
        made = t.channels_of(MADE, i)
        there = (made < OUT_CHANNELS)[:, None] & (k < WIDTH)[None, :]
        tl.store(partial + made[:, None] * WIDTH + (k % CHANNELS * 9 + k // CHANNELS)[None, :], sums[i], mask=there)
        if chunk == 0:
            tl.store(partial + OUT_CHANNELS * WIDTH + made, dbias[i], mask=made < OUT_CHANNELS)


# In kernels


@triton.jit
def image_of(images, stride, batch):
    return images + batch.to(tl.int64) * stride


@triton.jit
def load_packed(image, pixel, inside, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return all channels of pixels of a packed image."""
    return t.load_pixels(image + pixel.to(tl.int64) * CHANNELS, (0, 1), inside, CHANNELS, TILES)


@triton.jit
def store_packed(image, pixel, inside, tiles, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Write all channels of pixels of a packed image."""
    t.store_pixels(image + pixel.to(tl.int64) * CHANNELS, (0, 1), inside, tiles, CHANNELS, TILES)


@triton.jit
def around(pixel, inside, line):
    """Return what `load_window` has to know: the pixels' rows, and which of the windows' three columns exist."""
    row, column = pixel // line, pixel % line
    return tl.where(inside, row, -2), tl.where(column > 0, 0, 1), tl.where(column + 1 < line, 3, 2)


@triton.jit
def load_window(pointers, neighbours, down, lines, k, CHANNELS: tl.constexpr):
    """Return elements k (columns,) of windows `down` lines below pixels, as a tile (PIXELS, columns)."""
    row, first, end = neighbours
    end = tl.where((row + down >= 0) & (row + down < lines), end, 0)
    column = (k // CHANNELS)[None, :]
    there = (column >= first[:, None]) & (column < end[:, None])
    return tl.load(pointers[:, None] + k[None, :], mask=there, other=0)


@triton.jit
def convolve(
    image, columns, pixel, inside, lines, line,
    CHANNELS: tl.constexpr, WINDOW: tl.constexpr, TURNS: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the convolution of a packed image as float32 tiles (PIXELS, MADE[i])."""
    neighbours = around(pixel, inside, line)
    sums = t.zeros(pixel.shape[0], MADE)
    for turn in tl.range(0, 3 * TURNS, disable_licm=True):
        down = turn // TURNS - 1
        pointers = image + (pixel + down * line - 1).to(tl.int64) * CHANNELS
        for j in tl.static_range(len(WINDOW)):
            k = turn % TURNS * t.start(WINDOW, len(WINDOW)) + t.channels_of(WINDOW, j)
            seen = load_window(pointers, neighbours, down, lines, k, CHANNELS)
            row = (down + 1) * (3 * CHANNELS) + k
            before, sums = sums, ()
            for i in tl.static_range(len(MADE)):
                made = t.channels_of(MADE, i)
                there = (k < 3 * CHANNELS)[:, None] & (made < OUT_CHANNELS)[None, :]
                matrix = tl.load(columns + row[:, None] * OUT_CHANNELS + made[None, :], mask=there, other=0)
                sums += (t.dot(seen, matrix, before[i], PRECISION),)
    return sums

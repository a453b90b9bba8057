"""Triton kernels of `striped_conv` for 16-bit images whose planes fit a tile, as a training's patches do.

    forward   y and, for `striped_conv_router`, its sums                                                 one launch
    backward  ds and the gradients of the column step; dx and those of the row step                    two launches
              the second stage of all their sums                                       one launch, or a shared one

Along rows and along columns a convolution is a product with a matrix whose diagonals hold the taps, for the matrix
units. X is a plane (one batch and channel), A of weight_row and B of weight_col, both [i, j] = weight[i - j + K // 2]:

    R = X @ A + bias_row              S = transposed B @ R + bias_col       y = gate * activation(S)
    dS = dy * gate * activation'(S)   dR = B @ dS                           dX = dR @ transposed A

and the gradient of tap k is the sum along a diagonal: of dS @ transposed R, and of transposed dR @ X. Multiplied by B,
R and dS are sums of two 16-bit numbers; otherwise they and dR are rounded, as by torch between its convolutions. An
infinity makes NaN of its row and column in a plane, where 0 is multiplied by it.

With two warps, Triton multiplies by mma.sync on every architecture (`configurations`). Backward's programs have strips
of a plane, because the registers of two warps do not suffice for all of it.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..backends.planes import new_image
from .activation import activate, activate_with_slope, activation_of
from .integers import cdiv, next_power_of_2
from .launch import Launch
from .rounding import INTERPRETED, round_to
from .strided import store, strided
from .sums import add_parts, new_partial

SIDE = 64  # of a plane, at most
STRIP = 32  # rows of a plane that a program of backward has
MOST_TAPS = 15  # whose sums are a row of 16


def fits(weight: Tensor, *images: Tensor | None) -> bool:
    """Return whether these kernels serve for images, the first of which is x, and a weight along rows."""
    x = images[0]
    if x is None or x.numel() == 0 or x.element_size() != 2 or weight[0].numel() > MOST_TAPS:
        return False
    largest = SIDE * max(sum(image.stride()[2:]) for image in images if image is not None)
    return max(x.shape[2:]) <= SIDE and largest < 2**31


def forward(y, x, weight_row, bias_row, weight_col, bias_col, gelu, gate, sums=None) -> Iterator[Launch]:
    """Yield what writes y and, if given, `sums` (1, B, C) of its planes."""
    images = strided(y=y, x=x, gate=gate) | dict(sums=sums)
    parameters = dict(weight_row=weight_row, bias_row=bias_row, weight_col=weight_col, bias_col=bias_col)
    yield over_planes(planes_forward, x, images | parameters | dict(ACTIVATION=activation_of(gelu)))


def backward(
    dx, dgate, dweight_row, dbias_row, dweight_col, dbias_col, dy,
    x, weight_row, bias_row, weight_col, bias_col, gelu, gate, dmean, y,
) -> Iterator[Launch]:  # fmt: skip
    gradients = [dweight_row, dbias_row, dweight_col, dbias_col]
    strips = cdiv(x.shape[2], STRIP)
    partial = new_partial(len(x) * strips, gradients)
    ds, ds_rest = new_image(x, 2 * x.shape[1]).chunk(2, dim=1)  # 16-bit numbers whose sum is dS
    images = strided(ds=ds, ds_rest=ds_rest, dgate=dgate, y=y, dy=dy, x=x, gate=gate) | dict(
        dmean=dmean, partial=partial
    )
    weights = dict(weight_row=weight_row, weight_col=weight_col)
    biases = dict(bias_row=bias_row, bias_col=bias_col, ACTIVATION=activation_of(gelu))
    yield over_planes(planes_backward_columns, x, images | weights | biases, strips)
    yield over_planes(
        planes_backward_rows, x, strided(dx=dx, ds=ds, ds_rest=ds_rest, x=x) | weights | dict(partial=partial), strips
    )
    yield add_parts(gradients, partial)


def over_planes(kernel, x: Tensor, arguments: dict, strips: int = 0) -> Launch:
    """Describe a launch with one program for each plane, or for each of its strips."""
    batch, channels, height, width = x.shape
    rows, columns = (max(16, next_power_of_2(side)) for side in (height, width))
    sizes = dict(channels=channels, height=height, width=width, TAPS=arguments["weight_row"][0].numel())
    sizes |= dict(ROWS=rows, COLUMNS=columns) | (dict(strips=strips, STRIP=min(STRIP, rows)) if strips else {})
    warps, programs = 2 if rows > 16 else 1, batch * channels * max(1, strips)
    # Left to itself, ptxas spills some registers for more warps at a time (sm_120).
    return Launch(kernel, programs, arguments | sizes, warps, {"num_stages": 1, "maxnreg": 255})


# Kernels


@triton.jit(do_not_specialize=["channels", "height"])
def planes_forward(
    y, y_strides, x, x_strides, gate, gate_strides, sums, weight_row, bias_row, weight_col, bias_col,
    channels, height, width,
    TAPS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = gate * activation(S), and sums[0, image, channel] the sum of a plane of y."""
    dtype: tl.constexpr = x.dtype.element_ty
    channel, image = tl.program_id(0) % channels, tl.program_id(0) // channels
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    seen = load_plane(x, x_strides, image, channel, row, column, height, width)
    r = along_rows(seen, weight_row, bias_row, channel, row, column, height, TAPS)
    out = activate(along_columns(r, weight_col, bias_col, channel, row, row, dtype, TAPS), ACTIVATION, dtype)
    if gate is not None:
        out *= load_plane(gate, gate_strides, image, channel, row, column, height, width)
    out = round_to(out, dtype)
    store_plane(y, y_strides, image, channel, row, column, height, width, out)
    if sums is not None:
        inside = (row < height)[:, None] & (column < width)[None, :]
        tl.store(sums + image * channels + channel, tl.sum(tl.where(inside, out.to(tl.float32), 0)))


@triton.jit(do_not_specialize=["channels", "height", "strips"])
def planes_backward_columns(
    ds, ds_strides, ds_rest, ds_rest_strides, dgate, dgate_strides, y, y_strides, dy, dy_strides, x, x_strides,
    gate, gate_strides, dmean, partial, weight_row, bias_row, weight_col, bias_col, channels, height, width, strips,
    TAPS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """ds, dgate, y again if wanted, and the second half of partial[strip], the sums over the pixels of a strip.

    partial is (B strips, C K + C + C K + C). To dy is added the share of a pixel in dmean (B, C).
    """
    dtype: tl.constexpr = x.dtype.element_ty
    channel, part = tl.program_id(0) % channels, tl.program_id(0) // channels
    image, first = part // strips, part % strips * STRIP
    row, column, all_rows = first + tl.arange(0, STRIP), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    seen = load_plane(x, x_strides, image, channel, all_rows, column, height, width)
    r = along_rows(seen, weight_row, bias_row, channel, all_rows, column, height, TAPS)
    s = along_columns(r, weight_col, bias_col, channel, all_rows, row, dtype, TAPS)
    activated, slope = activate_with_slope(s, ACTIVATION, dtype)
    if y is not None:
        out = activated
        if gate is not None:
            out *= load_plane(gate, gate_strides, image, channel, row, column, height, width)
        store_plane(y, y_strides, image, channel, row, column, height, width, out)
    gradient = load_plane(dy, dy_strides, image, channel, row, column, height, width).to(tl.float32)
    if dmean is not None:
        share = tl.load(dmean + image * channels + channel).to(tl.float32) / (height * width).to(tl.float32)
        gradient = tl.where((row < height)[:, None] & (column < width)[None, :], gradient + share, 0)
    if gate is not None:
        store_plane(dgate, dgate_strides, image, channel, row, column, height, width, gradient * activated)
        gradient *= load_plane(gate, gate_strides, image, channel, row, column, height, width)
    gradient *= slope
    narrow = round_to(gradient, dtype)
    store_plane(ds, ds_strides, image, channel, row, column, height, width, narrow)
    rest = gradient - narrow.to(tl.float32)
    store_plane(ds_rest, ds_rest_strides, image, channel, row, column, height, width, rest)
    dweight = diagonals(multiply(narrow, tl.trans(round_to(r, dtype))), row, TAPS)
    half = channels * (TAPS + 1)
    store_sums(partial + part.to(tl.int64) * (2 * half) + half, dweight, tl.sum(gradient), channel, channels, TAPS)


@triton.jit(do_not_specialize=["channels", "height", "strips"])
def planes_backward_rows(
    dx, dx_strides, ds, ds_strides, ds_rest, ds_rest_strides, x, x_strides, partial, weight_row, weight_col,
    channels, height, width, strips,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """dx, and the first half of partial[strip]."""
    dtype: tl.constexpr = x.dtype.element_ty
    channel, part = tl.program_id(0) % channels, tl.program_id(0) // channels
    image, first = part // strips, part % strips * STRIP
    row, column, all_rows = first + tl.arange(0, STRIP), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    matrix = band(weight_col + channel * TAPS, row, all_rows, TAPS)
    dr = multiply(matrix, load_plane(ds_rest, ds_rest_strides, image, channel, all_rows, column, height, width))
    dr = add_product(matrix, load_plane(ds, ds_strides, image, channel, all_rows, column, height, width), dr)
    dr = tl.where((row < height)[:, None], dr, 0)
    narrow = round_to(dr, dtype)
    out = multiply(narrow, tl.trans(band(weight_row + channel * TAPS, column, column, TAPS)))
    store_plane(dx, dx_strides, image, channel, row, column, height, width, out)
    seen = load_plane(x, x_strides, image, channel, row, column, height, width)
    dweight = diagonals(multiply(tl.trans(narrow), seen), column, TAPS)
    to = partial + part.to(tl.int64) * (2 * channels * (TAPS + 1))
    store_sums(to, dweight, tl.sum(dr), channel, channels, TAPS)


# Planes


@triton.jit
def plane_at(image, strides, batch, channel, row, column):
    """Return pointers to pixels of a plane; offsets in it are 32-bit (`fits`)."""
    plane = image + batch.to(tl.int64) * strides[0] + channel.to(tl.int64) * strides[1]
    return plane + (row[:, None] * strides[2] + column[None, :] * strides[3])


@triton.jit
def load_plane(image, strides, batch, channel, row, column, height, width):
    """Return rows and columns of a plane, with zeros outside of it."""
    inside = (row < height)[:, None] & (column < width)[None, :]
    return tl.load(plane_at(image, strides, batch, channel, row, column), mask=inside, other=0)


@triton.jit
def store_plane(image, strides, batch, channel, row, column, height, width, values):
    inside = (row < height)[:, None] & (column < width)[None, :]
    store(plane_at(image, strides, batch, channel, row, column), values, inside)


@triton.jit
def along_rows(plane, weight, bias, channel, row, column, height, TAPS: tl.constexpr):
    """Return R, with zeros below the last row."""
    shift = tl.load(bias + channel).to(tl.float32)
    r = multiply(plane, band(weight + channel * TAPS, column, column, TAPS)) + shift
    return tl.where((row < height)[:, None], r, 0)


@triton.jit
def along_columns(r, weight, bias, channel, all_rows, row, dtype: tl.constexpr, TAPS: tl.constexpr):
    """Return rows of S."""
    s = multiply_sum(tl.trans(band(weight + channel * TAPS, all_rows, row, TAPS)), r, dtype)
    return s + tl.load(bias + channel).to(tl.float32)


@triton.jit
def add_product(a, b, sums):
    """sums + a @ b; a and b are of one 16-bit dtype, sums are float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def multiply(a, b):
    return add_product(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@triton.jit
def multiply_sum(a, b, dtype: tl.constexpr):
    """a @ b, where b, float32, is taken as the sum of two 16-bit numbers."""
    high = round_to(b, dtype)
    return add_product(a, round_to(b - high.to(tl.float32), dtype), multiply(a, high))


@triton.jit
def band(weight, i, j, TAPS: tl.constexpr):
    """Return rows i and columns j of the matrix of a channel's taps."""
    k = i[:, None] - j[None, :] + TAPS // 2
    return tl.load(weight + k, mask=(k >= 0) & (k < TAPS), other=0)


@triton.jit
def diagonals(products, i, TAPS: tl.constexpr):
    """Return the sums (16,) along the diagonals [i, i + k - TAPS // 2] of rows i of a matrix."""
    SIZE: tl.constexpr = products.shape[1]
    column = i[:, None] + tl.arange(0, 16)[None, :] - TAPS // 2
    exists = (column >= 0) & (column < SIZE)
    seen = tl.gather(products, tl.where(exists, column, 0), axis=1)
    return tl.sum(tl.where(exists, seen, 0), axis=0)


@triton.jit
def store_sums(to, dweight, dbias, channel, channels, TAPS: tl.constexpr):
    """Write the sums of a channel's taps (16,), and that of its bias."""
    k = tl.arange(0, 16)
    tl.store(to + channel * TAPS + k, dweight, mask=k < TAPS)
    tl.store(to + channels * TAPS + channel, dbias)

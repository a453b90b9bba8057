"""Triton kernels of `striped_conv`; formula and shapes in `seemore_fast.reference.striped_conv`.

    forward   r = row(x)                              s = column(r)                            y = gate * activation(s)
    backward  dgate = dy * activation(s)              ds = dy * gate * activation'(s)
              dr = transposed column(ds)              dx = transposed row(dr)

Each line's left and right side are a launch, except that y comes out of the column step and dgate with ds. What
passes between launches is a workspace of the accumulation dtype: float32, or float64 for float64. 16-bit images with
small planes have kernels of their own (`striped_conv_planes`). Images have any
strides. A program works on a tile of lines x columns; a line is one (batch, channel, row), so that small images fill a
tile, too. Offsets are 64-bit. Lines are counted in 64 bits only where they must be, because counts are divided.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import striped_conv_planes as planes
from .activation import activate, activate_with_slope, activation_of
from .integers import cdiv, next_power_of_2
from .launch import Launch, launched, named
from .strided import index_type, new_workspace, pixels_of, store, strided
from .sums import add_parts, new_partial

TILE = 1024  # pixels of a program
WARPS = 8  # so 4 pixels per thread: one load of 16 bytes
WIDEST = 64  # columns of a tile, at most
PART = 4096  # pixels whose tap gradients one program adds up, at most
PRODUCTS = 2048  # (tap, pixel) pairs that such a program holds at a time


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    batch, channels = x.shape[:2]
    weight_row, bias = x.new_empty(channels, 1, 1, 11), x.new_empty(channels)
    parameters = weight_row, bias, weight_row.transpose(2, 3), bias
    cases = {"": x}
    if planes.fits(weight_row, x):
        cases = {"": x.new_empty(batch, channels, 2 * planes.SIDE, 2 * planes.SIDE), ", of planes": x}
    for what, x in cases.items():
        image, mean = torch.empty_like(x), x.new_empty(batch, channels)
        for gelu, gate in [(True, image), (True, None), (False, image), (False, None)]:
            options = f"{activation_of(gelu)}{' gated' if gate is not None else ''}{what}"
            yield from named("forward", forward(image, x, *parameters, gelu, gate), options)
            more = dict(dmean=None, y=image) if gate is not None else dict(dmean=mean)
            gradients = backward(image, gate, *parameters, image, x, *parameters, gelu, gate, **more)
            yield from named("backward", gradients, options)


# What is launched


def forward(y, x, weight_row, bias_row, weight_col, bias_col, gelu, gate) -> Iterator[Launch]:
    if x.numel() == 0:
        return
    if planes.fits(weight_row, x, y, gate):
        yield from planes.forward(y, x, weight_row, bias_row, weight_col, bias_col, gelu, gate)
        return
    r = new_workspace(x)
    yield convolution(r, x, weight_row, bias_row, vertical=False)
    yield convolution(y, r, weight_col, bias_col, vertical=True, gelu=gelu, gate=gate)


def backward(
    dx, dgate, dweight_row, dbias_row, dweight_col, dbias_col, dy,
    x, weight_row, bias_row, weight_col, bias_col, gelu, gate, dmean=None, y=None,
) -> Iterator[Launch]:  # fmt: skip
    """Yield what writes the gradients and, if given, y again; `dmean` (B, C) is that of y's mean, besides dy."""
    gradients = dweight_row, dbias_row, dweight_col, dbias_col
    if planes.fits(weight_row, x, dx, dy, gate, dgate, y):
        inputs = x, weight_row, bias_row, weight_col, bias_col, gelu, gate
        yield from planes.backward(dx, dgate, *gradients, dy, *inputs, dmean, y)
        return
    partial = new_partial(parts_of(x), gradients)
    if x.numel() == 0:
        yield add_parts(gradients, partial)
        return
    r, ds = new_workspace(x), dy
    yield convolution(r, x, weight_row, bias_row, vertical=False)
    if y is not None:
        yield convolution(y, r, weight_col, bias_col, vertical=True, gelu=gelu, gate=gate)
    if gelu or gate is not None or dmean is not None:
        s = new_workspace(x)
        yield convolution(s, r, weight_col, bias_col, vertical=True)
        ds = s  # overwritten by its gradient
        images = strided(s=s, dgate=dgate, dy=dy, gate=gate) | dict(dmean=dmean)
        yield over_tiles(activation_backward, x, images | dict(ACTIVATION=activation_of(gelu)))
    yield tap_gradient(partial, ds, r, vertical=True)
    dr = new_workspace(x)
    yield convolution(dr, ds, weight_col, vertical=True, transposed=True)
    yield tap_gradient(partial, dr, x, vertical=False)
    yield add_parts(gradients, partial)
    yield convolution(dx, dr, weight_row, vertical=False, transposed=True)


striped_conv, striped_conv_backward = launched(forward), launched(backward)


def convolution(
    y, x, weight, bias=None, *, vertical: bool, transposed: bool = False, gelu: bool = False, gate=None
) -> Launch:
    arguments = strided(y=y, x=x, gate=gate) | dict(weight=weight, bias=bias, TAPS=weight[0].numel())
    options = dict(VERTICAL=vertical, TRANSPOSED=transposed, ACTIVATION=activation_of(gelu))
    return over_tiles(convolve, x, arguments | options)


def over_tiles(kernel, x: Tensor, arguments: dict) -> Launch:
    """Describe a launch with one program per tile of images like x."""
    batch, channels, height, width = x.shape
    columns = min(WIDEST, max(16, next_power_of_2(width)))
    sizes = dict(lines=batch * channels * height, channels=channels, height=height, width=width)
    tile = dict(LINES=TILE // columns, COLUMNS=columns, INDEX=index_type(sizes["lines"] + TILE))
    programs = cdiv(sizes["lines"], tile["LINES"]) * cdiv(width, columns)
    return Launch(kernel, programs, arguments | sizes | tile, WARPS)


def tap_gradient(partial: Tensor, dy: Tensor, x: Tensor, *, vertical: bool) -> Launch:
    batch, channels, height, width = x.shape
    pixels, taps = batch * height * width, partial.shape[1] // channels // 2 - 1
    rows, part = next_power_of_2(taps + 1), part_size(x)
    sizes = dict(channels=channels, height=height, width=width, pixels=pixels)
    at_a_time = min(part, max(16, PRODUCTS // rows))  # powers of 2, so it divides the part
    tile = dict(ROWS=rows, PIXELS=at_a_time, PART=part, INDEX=index_type(pixels + part))
    images = strided(dy=dy, x=x)
    arguments = dict(partial=partial, **images, **sizes, **tile, TAPS=taps, VERTICAL=vertical)
    return Launch(convolve_taps, len(partial) * channels, arguments, WARPS)


def part_size(x: Tensor) -> int:
    """Return how many pixels of a channel (batch, row, column) one program adds up."""
    return min(PART, max(16, next_power_of_2(x.numel() // x.shape[1])))


def parts_of(x: Tensor) -> int:
    """Return into how many parts the pixels of a channel are cut."""
    return cdiv(x.numel() // x.shape[1], part_size(x)) if x.numel() else 0


# Kernels


@triton.jit(do_not_specialize=["lines", "channels", "height"])
def convolve(
    y, y_strides, x, x_strides, gate, gate_strides, weight, bias, lines, channels, height, width,
    TAPS: tl.constexpr, VERTICAL: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = gate * activation(bias + sum over k of weight[channel, k] * x at k - TAPS // 2 along one axis)."""
    batch, channel, row, column, inside = locate(lines, channels, height, width, LINES, COLUMNS, INDEX)
    ACCUMULATION: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((LINES, COLUMNS), ACCUMULATION)
    if bias is not None:
        total += tl.load(bias + channel).to(ACCUMULATION)
    position, size = (row, height) if VERTICAL else (column, width)
    step = tl.full((), 1, tl.int64) * x_strides[2 if VERTICAL else 3]
    centre = pixels_of(x, x_strides, batch, channel, row, column)
    taps = weight + channel * TAPS
    # 4: rows aligned to 16 bytes stay so every fourth tap, registers suffice, and any K compiles at once
    for k in tl.range(0, TAPS, loop_unroll_factor=4):
        shift = k - TAPS // 2
        there = position + shift
        exists = inside & (there >= 0) & (there < size)
        seen = tl.load(centre + shift * step, mask=exists, other=0).to(ACCUMULATION)
        total += tl.load(taps + (TAPS - 1 - k if TRANSPOSED else k)).to(ACCUMULATION) * seen
    total = activate(total, ACTIVATION, y.dtype.element_ty)
    if gate is not None:
        factor = tl.load(pixels_of(gate, gate_strides, batch, channel, row, column), mask=inside, other=0)
        total *= factor.to(ACCUMULATION)
    store(pixels_of(y, y_strides, batch, channel, row, column), total, inside)


@triton.jit(do_not_specialize=["lines", "channels", "height"])
def activation_backward(
    s, s_strides, dgate, dgate_strides, dy, dy_strides, gate, gate_strides, dmean, lines, channels, height, width,
    ACTIVATION: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dgate = dy * activation(s), and s becomes its gradient dy * gate * activation'(s).

    To dy is added the share of a pixel in dmean.
    """
    batch, channel, row, column, inside = locate(lines, channels, height, width, LINES, COLUMNS, INDEX)
    s_pointer = pixels_of(s, s_strides, batch, channel, row, column)
    value = tl.load(s_pointer, mask=inside, other=0)
    gradient = tl.load(pixels_of(dy, dy_strides, batch, channel, row, column), mask=inside, other=0).to(value.dtype)
    if dmean is not None:
        pixels = tl.full((), 1, value.dtype) * height * width
        gradient += tl.load(dmean + batch * channels + channel, mask=inside, other=0).to(value.dtype) / pixels
    activated, slope = activate_with_slope(value, ACTIVATION, s.dtype.element_ty)
    if gate is not None:
        store(pixels_of(dgate, dgate_strides, batch, channel, row, column), gradient * activated, inside)
        factor = tl.load(pixels_of(gate, gate_strides, batch, channel, row, column), mask=inside, other=0)
        gradient *= factor.to(value.dtype)
    tl.store(s_pointer, gradient * slope, mask=inside)


@triton.jit(do_not_specialize=["channels", "height"])
def convolve_taps(
    partial, dy, dy_strides, x, x_strides, channels, height, width, pixels,
    TAPS: tl.constexpr, VERTICAL: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, PART: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """partial[part] = for each channel, sums over a part of the pixels of dy * x at k - TAPS // 2 each k, and of dy.

    partial is (parts, C K + C + C K + C), of which one half is written. The sums of a channel are rows of one tensor;
    row TAPS is the bias's, where x counts as 1.
    """
    part, channel = tl.program_id(0) // channels, tl.program_id(0) % channels
    k = tl.arange(0, ROWS)[:, None]
    shift = k - TAPS // 2
    step = shift.to(tl.int64) * x_strides[2 if VERTICAL else 3]
    total = tl.zeros((ROWS, PIXELS), partial.dtype.element_ty)
    for start in range(0, PART, PIXELS):
        pixel = part.to(INDEX) * PART + start + tl.arange(0, PIXELS)[None, :]
        line, column = pixel // width, pixel % width
        batch, row = line // height, line % height
        gradient = tl.load(pixels_of(dy, dy_strides, batch, channel, row, column), mask=pixel < pixels, other=0)
        there = (row if VERTICAL else column) + shift
        exists = (pixel < pixels) & (k < TAPS) & (there >= 0) & (there < (height if VERTICAL else width))
        seen = tl.load(pixels_of(x, x_strides, batch, channel, row, column) + step, mask=exists, other=0)
        total += gradient.to(total.dtype) * tl.where(k == TAPS, 1, seen.to(total.dtype))
    half = channels * (TAPS + 1)
    sums = partial + part.to(tl.int64) * (2 * half) + (half if VERTICAL else 0)
    k = tl.arange(0, ROWS)
    to = sums + tl.where(k < TAPS, channel * TAPS + k, channels * TAPS + channel)
    tl.store(to, tl.sum(total, axis=1), mask=k <= TAPS)


@triton.jit
def locate(lines, channels, height, width, LINES: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr):
    """Return batch, channel, row (LINES, 1) and column (1, COLUMNS) of a tile, and which of its pixels are real."""
    tiles = (width + COLUMNS - 1) // COLUMNS
    line = (tl.program_id(0) // tiles).to(INDEX) * LINES + tl.arange(0, LINES)[:, None]
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    image = line // height
    return image // channels, image % channels, line % height, column, (line < lines) & (column < width)

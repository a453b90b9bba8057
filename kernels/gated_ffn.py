"""Triton kernels of `gated_ffn`; formula and shapes in `seemore_fast.reference.gated_ffn`.

    forward    g = GELU(LN(x) @ W_g)                                             one launch (`norm_pointwise`)
               u = GELU(LN(x) @ W_u);  h = u * (stencil(g) + bias_gate);  y = x + GELU(h @ W_2)             one more
    backward   u and g again                                                     one launch (`norm_pointwise`)
               h and z = h @ W_2 again;  dz = dy * GELU'(z);  dh = dz @ transposed W_2                      one more
               the gradients of the gate (`gate_gradients`), of weight_2 (`products`) and of `norm_pointwise`

What neighbours must see goes through memory: g, in forward. A program of forward has PIXELS pixels and goes over blocks
of channels; g's workspace has channels innermost, so that all nine shifts of a block are wide, aligned loads.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.planes import new_image
from . import gate_gradients, norm_pointwise
from . import tiles as t
from .activation import activate, slope
from .launch import Launch, launched, named
from .products import parts_of, products
from .rounding import round_to
from .strided import strided
from .sums import add_parts, new_partial


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    channels = x.shape[1]
    vector, square, twice = x.new_empty(channels), x.new_empty(channels, channels, 1, 1), x.new_empty(2 * channels)
    wide, taps = x.new_empty(2 * channels, channels, 1, 1), x.new_empty(channels, 1, 3, 3)
    parameters = vector, vector, wide, twice, taps, vector, square, vector
    yield from named("forward", forward(x, x, *parameters, 1e-6))
    yield from named("backward", backward(x, *parameters, x, x, *parameters, 1e-6))


# What is launched


def forward(
    y, x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps
) -> Iterator[Launch]:
    if x.numel() == 0:
        return
    channels = x.shape[1]
    g = t.workspace(x, channels, weight_1.dtype)
    yield from norm_pointwise.forward(g, x, norm_weight, norm_bias, weight_1[channels:], bias_1[channels:], True, eps)
    parameters = dict(norm_weight=norm_weight, norm_bias=norm_bias, weight_1=weight_1, bias_1=bias_1, eps=eps)
    parameters |= end(x, weight_gate, bias_gate, weight_2, bias_2)
    yield t.over_tiles(gated_ffn_forward, "gated_ffn forward", [y, x], strided(y=y, x=x, g=g) | parameters)


def backward(
    dx, dnorm_weight, dnorm_bias, dweight_1, dbias_1, dweight_gate, dbias_gate, dweight_2, dbias_2, dy,
    x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps,
) -> Iterator[Launch]:  # fmt: skip
    channels = x.shape[1]
    # u, g and dh are float32: their rounding would show in all sums over the image, twice as much as torch's does.
    ug, dug = new_image(x, 2 * channels, torch.float32), new_image(x, 2 * channels, weight_1.dtype)
    (u, g), (du, dg) = ug.split(channels, dim=1), dug.split(channels, dim=1)
    dh, h, dz = new_image(x, channels, torch.float32), *(t.workspace(x, channels, weight_1.dtype) for _ in range(2))
    layer = x, norm_weight, norm_bias, weight_1, bias_1, True, eps
    if x.numel():
        yield from norm_pointwise.forward(ug, *layer)
        images = strided(dh=dh, h=h, dz=dz, dy=dy, u=u, g=g)
        parameters = end(x, weight_gate, bias_gate, weight_2, bias_2)
        yield t.over_tiles(gated_ffn_backward_gate, "gated_ffn backward", [dy], images | parameters)
    partial = new_partial(parts_of(h, "products") if x.numel() else 0, [dweight_2, dbias_2])
    if x.numel():
        yield products(partial, dz, h)
    yield add_parts([dweight_2, dbias_2], partial)
    yield from gate_gradients.backward(du, dg, dweight_gate, dbias_gate, dh, u, g, weight_gate, bias_gate)
    of_layer = dx, dnorm_weight, dnorm_bias, dweight_1, dbias_1
    yield from norm_pointwise.backward(*of_layer, dug, *layer, residual=dy)


gated_ffn, gated_ffn_backward = launched(forward), launched(backward)


def end(x: Tensor, weight_gate: Tensor, bias_gate: Tensor, weight_2: Tensor, bias_2: Tensor) -> dict:
    """Return as the kernels' arguments what both kernels do from the gate on."""
    taps = weight_gate.flatten(1).t().contiguous()  # (9, C): one wide load for a block of channels, not one for each
    tiles = t.cut(x.shape[1])
    sizes = dict(rows=x.shape[2], columns=x.shape[3], CHANNELS=x.shape[1], TILES=tiles, BLOCK=tiles[0])
    sizes |= dict(PRECISION=t.precision(weight_2.dtype))
    return dict(taps=taps, bias_gate=bias_gate, weight_2=weight_2, bias_2=bias_2) | sizes


# Kernels


@triton.jit(do_not_specialize=["pixels", "width", "rows", "columns"])
def gated_ffn_forward(
    y, y_strides, x, x_strides, g, g_strides, norm_weight, norm_bias, weight_1, bias_1, eps,
    taps, bias_gate, weight_2, bias_2, pixels, width, rows, columns,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    ROOM: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x + GELU((u * gate) @ weight_2 + bias_2), PIXELS pixels of an image."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    dtype: tl.constexpr = weight_1.dtype.element_ty
    seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, TILES)
    n, _ = t.normalise(seen, eps, CHANNELS, TILES)
    n = t.affine(n, norm_weight, norm_bias, dtype, CHANNELS, TILES)
    z = t.zeros(PIXELS, TILES)
    for start in tl.range(0, CHANNELS, BLOCK, disable_licm=True):
        block = start + tl.arange(0, BLOCK)
        matrix = t.load_columns(weight_1, 1, CHANNELS, block, CHANNELS, TILES, CHANNELS)
        u = activate(t.multiply(n, matrix, t.load_row(bias_1, block, CHANNELS), PRECISION), "gelu", dtype)
        factor = gate(g, g_strides, taps, bias_gate, image, pixel, inside, block, rows, columns, CHANNELS)
        h = round_to(u * factor, dtype)
        z = t.multiply_block(h, load_lines(weight_2, block, CHANNELS, TILES), z, PRECISION)
    out = ()
    for i in tl.static_range(len(TILES)):
        s = z[i] + t.load_row(bias_2, t.channels_of(TILES, i), CHANNELS)
        out += (seen[i].to(tl.float32) + activate(s, "gelu", y.dtype.element_ty),)
    t.store_pixels(t.address(y, y_strides, image, pixel, width), y_strides, inside, out, CHANNELS, TILES)


@triton.jit(do_not_specialize=["pixels", "width", "rows", "columns"])
def gated_ffn_backward_gate(
    dh, dh_strides, h, h_strides, dz, dz_strides, dy, dy_strides, u, u_strides, g, g_strides,
    taps, bias_gate, weight_2, bias_2, pixels, width, rows, columns,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    ROOM: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = u * gate, dz = dy * GELU'(h @ weight_2 + bias_2) and dh = dz @ transposed weight_2."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    dtype: tl.constexpr = weight_2.dtype.element_ty
    z = t.zeros(PIXELS, TILES)
    for start in tl.range(0, CHANNELS, BLOCK, disable_licm=True):
        block = start + tl.arange(0, BLOCK)
        factor = gate(g, g_strides, taps, bias_gate, image, pixel, inside, block, rows, columns, CHANNELS)
        gated = t.load_tile(t.address(u, u_strides, image, pixel, None), u_strides, inside, block, CHANNELS)
        gated = round_to(gated.to(tl.float32) * factor, dtype)
        t.store_tile(t.address(h, h_strides, image, pixel, None), h_strides, inside, gated, block, CHANNELS)
        z = t.multiply_block(gated, load_lines(weight_2, block, CHANNELS, TILES), z, PRECISION)
    upstream = t.load_pixels(t.address(dy, dy_strides, image, pixel, width), dy_strides, inside, CHANNELS, TILES)
    gradient = ()
    for i in tl.static_range(len(TILES)):
        s = z[i] + t.load_row(bias_2, t.channels_of(TILES, i), CHANNELS)
        gradient += (round_to(upstream[i].to(tl.float32) * slope(s, "gelu", dtype), dtype),)
    t.store_pixels(t.address(dz, dz_strides, image, pixel, None), dz_strides, inside, gradient, CHANNELS, TILES)
    for start in tl.range(0, CHANNELS, BLOCK, disable_licm=True):
        block = start + tl.arange(0, BLOCK)
        matrix = t.load_columns(weight_2, CHANNELS, 1, block, CHANNELS, TILES, CHANNELS)
        back = t.multiply(gradient, matrix, tl.zeros((1, BLOCK), tl.float32), PRECISION)
        t.store_tile(t.address(dh, dh_strides, image, pixel, None), dh_strides, inside, back, block, CHANNELS)


@triton.jit
def gate(g, g_strides, taps, bias, image, pixel, inside, block, rows, columns, CHANNELS: tl.constexpr):
    """Return bias + depthwise3x3(g), a block of channels (PIXELS, BLOCK) in float32."""
    row, column = pixel // columns, pixel % columns
    centre = t.address(g, g_strides, image, pixel, None)
    total = tl.broadcast_to(t.load_row(bias, block, CHANNELS), (pixel.shape[0], block.shape[0]))
    for line in tl.range(0, 3, disable_licm=True):  # not all nine at once: registers
        there = inside & (row + line >= 1) & (row + line <= rows)
        above = centre + (line - 1) * g_strides[2]
        for right in tl.static_range(-1, 2):
            exists = there & (column + right >= 0) & (column + right < columns)
            seen = t.load_tile(above + right * g_strides[3], g_strides, exists, block, CHANNELS)
            total += t.load_row(taps + (3 * line + right + 1) * CHANNELS, block, CHANNELS) * seen.to(tl.float32)
    return total


@triton.jit
def load_lines(weight, block, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return lines `block` of transposed weight (CHANNELS, CHANNELS) as tiles (BLOCK, TILES[i])."""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        made = t.channels_of(TILES, i)
        there = (block < CHANNELS)[:, None] & (made < CHANNELS)[None, :]
        tiles += (tl.load(weight + block[:, None] + made[None, :] * CHANNELS, mask=there, other=0),)
    return tiles

"""Triton kernels of `norm_pointwise`; formula and shapes in `seemore_fast.reference.norm_pointwise`.

    forward    s = LN(x) @ W + bias;  y = residual + activation(s)                           one launch
    backward   s again;  ds = dy * activation'(s);  dx from ds @ transposed W                one launch
               sums over the pixels of ds times LN(x) (`products`), and add them up          two launches

Only ds passes through memory, where there is an activation; in float32, because its sums are bias' gradient. Of 36
channels 48 are summed over by the matrix units and 80 made of 72: they multiply 1.48 times what is needed (1.78 for
36 of 36; nothing is wasted for 48 and 64).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .activation import activate, activation_of, slope
from .launch import Launch, launched, named
from .products import parts_of, products
from .rounding import round_to
from .strided import strided
from .sums import add_parts, new_partial


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    channels = x.shape[1]
    vector, square = x.new_empty(channels), x.new_empty(channels, channels, 1, 1)
    wide = torch.empty_like(x).repeat(1, 2, 1, 1), x.new_empty(2 * channels, channels, 1, 1), x.new_empty(2 * channels)
    for y, weight, bias, norm, gelu, residual in [
        (*wide, vector, True, None),
        (*wide, vector, False, None),
        (x, square, vector, vector, True, None),
        (x, square, vector, None, False, x),
    ]:
        options = f"{y.shape[1]} {activation_of(gelu)}"
        options += f"{' norm' if norm is not None else ''}{' residual' if residual is x else ''}"
        inputs = x, norm, norm, weight, bias, gelu, 1e-6
        yield from named("forward", forward(y, *inputs, residual), options)
        yield from named("backward", backward(x, norm, norm, weight, bias, y, *inputs), options)


# What is launched


def forward(y, x, norm_weight, norm_bias, weight, bias, gelu, eps, residual=None) -> Iterator[Launch]:
    if x.numel() == 0:
        return
    images = [image for image in (y, x, residual) if image is not None]
    arguments = strided(y=y, x=x, residual=residual) | layer(x, norm_weight, norm_bias, weight, bias, gelu, eps)
    yield t.over_tiles(norm_pointwise_forward, "norm_pointwise forward", images, arguments)


def backward(
    dx, dnorm_weight, dnorm_bias, dweight, dbias, dy, x, norm_weight, norm_bias, weight, bias, gelu, eps, residual=None
) -> Iterator[Launch]:
    gradients = [g for g in (dnorm_weight, dnorm_bias, dweight, dbias) if g is not None]
    partial = new_partial(parts_of(x, "products") if x.numel() else 0, gradients)
    if x.numel():
        ds = t.workspace(x, dy.shape[1], torch.float32) if gelu else dy
        parameters = layer(x, norm_weight, norm_bias, weight, bias, gelu, eps)
        arguments = strided(dx=dx, ds=ds, dy=dy, x=x, residual=residual) | parameters
        images = [image for image in (dx, ds, dy, x, residual) if image is not None]
        yield t.over_tiles(norm_pointwise_backward_input, "norm_pointwise backward", images, arguments)
        yield products(partial, ds, x, weight, norm_weight, norm_bias, eps)
    yield add_parts(gradients, partial)


norm_pointwise, norm_pointwise_backward = launched(forward), launched(backward)


def layer(x: Tensor, norm_weight, norm_bias, weight: Tensor, bias, gelu: bool, eps: float) -> dict:
    """Return a layer as the kernels' arguments."""
    parameters = dict(norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias, eps=eps)
    tiles = t.cut(x.shape[1])
    sizes = dict(CHANNELS=x.shape[1], TILES=tiles, OUT_CHANNELS=weight.shape[0], BLOCK=tiles[0])
    return parameters | sizes | dict(ACTIVATION=activation_of(gelu), PRECISION=t.precision(weight.dtype))


# Kernels


@triton.jit(do_not_specialize=["pixels", "width"])
def norm_pointwise_forward(
    y, y_strides, x, x_strides, residual, residual_strides, norm_weight, norm_bias, weight, bias, eps, pixels, width,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    PIXELS: tl.constexpr, ROOM: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = residual + activation(LN(x) @ weight + bias), PIXELS pixels of an image."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, TILES)
    if norm_weight is not None:
        seen, _ = t.normalise(seen, eps, CHANNELS, TILES)
    n = t.affine(seen, norm_weight, norm_bias, weight.dtype.element_ty, CHANNELS, TILES)
    y_at = t.address(y, y_strides, image, pixel, width)
    if residual is not None:
        residual_at = t.address(residual, residual_strides, image, pixel, width)
    for start in tl.range(0, OUT_CHANNELS, BLOCK, disable_licm=True):
        made = start + tl.arange(0, BLOCK)
        matrix = t.load_columns(weight, 1, CHANNELS, made, CHANNELS, TILES, OUT_CHANNELS)
        s = t.multiply(n, matrix, t.load_row(bias, made, OUT_CHANNELS), PRECISION)
        out = activate(s, ACTIVATION, y.dtype.element_ty)
        if residual is not None:
            out += t.load_tile(residual_at, residual_strides, inside, made, OUT_CHANNELS).to(tl.float32)
        t.store_tile(y_at, y_strides, inside, out, made, OUT_CHANNELS)


@triton.jit(do_not_specialize=["pixels", "width"])
def norm_pointwise_backward_input(
    dx, dx_strides, ds, ds_strides, dy, dy_strides, x, x_strides, residual, residual_strides,
    norm_weight, norm_bias, weight, bias, eps,
    pixels, width,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    PIXELS: tl.constexpr, ROOM: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (to which `residual` is added) and, with an activation, ds: of the same PIXELS pixels of an image."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, TILES)
    if norm_weight is not None:
        seen, scale = t.normalise(seen, eps, CHANNELS, TILES)
    n = t.affine(seen, norm_weight, norm_bias, weight.dtype.element_ty, CHANNELS, TILES)
    dy_at, ds_at = t.address(dy, dy_strides, image, pixel, width), t.address(ds, ds_strides, image, pixel, width)
    dn = t.zeros(PIXELS, TILES)
    for start in tl.range(0, OUT_CHANNELS, BLOCK, disable_licm=True):
        made = start + tl.arange(0, BLOCK)
        matrix = t.load_columns(weight, 1, CHANNELS, made, CHANNELS, TILES, OUT_CHANNELS)
        gradient = t.load_tile(dy_at, dy_strides, inside, made, OUT_CHANNELS)
        if ACTIVATION is not None:
            s = t.multiply(n, matrix, t.load_row(bias, made, OUT_CHANNELS), PRECISION)
            gradient = gradient.to(tl.float32) * slope(s, ACTIVATION, ds.dtype.element_ty)
            t.store_tile(ds_at, ds_strides, inside, gradient, made, OUT_CHANNELS)
            gradient = round_to(gradient, weight.dtype.element_ty)
        dn = t.multiply_block(gradient, t.transposed(matrix), dn, PRECISION)
    if norm_weight is not None:
        dn = t.normalise_backward(t.times_row(dn, norm_weight, CHANNELS, TILES), seen, scale, CHANNELS)
    if residual is not None:
        residual_at = t.address(residual, residual_strides, image, pixel, width)
        dn = t.add(dn, t.load_pixels(residual_at, residual_strides, inside, CHANNELS, TILES))
    t.store_pixels(t.address(dx, dx_strides, image, pixel, width), dx_strides, inside, dn, CHANNELS, TILES)

"""Triton kernels of `norm_pointwise`; formula and shapes in `seemore_fast.reference.norm_pointwise`.

    forward    n = normalise(x);  s = n @ (gain * W) + ...;  y = activation(s)               one launch
    backward   s again;  ds = dy * activation'(s);  dx from ds @ transposed W                one launch
               sums over the pixels of ds times n (`products`), and add them up              two launches

Only ds passes through memory, where there is an activation. Of 36 channels 48 are summed over by the matrix units and 80
of 72 made: they multiply 1.48 times what is needed (1.78 for 36 of 36; nothing is wasted for 48 and 64).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, slope
from .configurations import configuration
from .images import index_type
from .launch import Launch, run
from .products import parts_of, products
from .rounding import narrow
from .sums import add_parts, new_partial
from .tiles import (
    at,
    cut,
    load_layer_after_norm,
    load_pixels,
    load_tile,
    multiply,
    multiply_block,
    narrow_all,
    normalise,
    normalise_backward,
    pixels_of,
    precision,
    store_pixels,
    store_tile,
    tile_of,
    transposed,
    zeros,
)  # fmt: skip


def norm_pointwise(
    y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
    activation: str | None, eps: float,
) -> None:  # fmt: skip
    """Write y (B, D, H, W)."""
    run(forward(y, x, norm_weight, norm_bias, weight, bias, activation, eps), x.device)


def norm_pointwise_backward(
    dx: Tensor, dnorm_weight: Tensor, dnorm_bias: Tensor, dweight: Tensor, dbias: Tensor, dy: Tensor,
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
    activation: str | None, eps: float,
) -> None:  # fmt: skip
    """Write dx and the gradients of the parameters."""
    gradients = dnorm_weight, dnorm_bias, dweight, dbias
    run(backward(dx, gradients, dy, x, norm_weight, norm_bias, weight, bias, activation, eps), x.device)


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    channels = x.shape[1]
    vector = x.new_empty(channels)
    for out in (channels, 2 * channels):
        weight, bias = x.new_empty(out, channels, 1, 1), x.new_empty(out)
        y = torch.empty_like(x).repeat(1, out // channels, 1, 1)
        for activation in (None, "gelu"):
            inputs = x, vector, vector, weight, bias, activation, 1e-6
            yield from ((f"forward {out} {activation}", launch) for launch in forward(y, *inputs))
            gradients = vector, vector, weight, bias
            for number, launch in enumerate(backward(x, gradients, y, *inputs)):
                yield f"backward {number} {out} {activation}", launch


# What is launched


def forward(y, x, norm_weight, norm_bias, weight, bias, activation, eps) -> Iterator[Launch]:
    if x.numel() == 0:
        return
    chosen = configuration("norm_pointwise forward", x)
    images = dict(y=y, y_strides=y.stride(), x=x, x_strides=x.stride())
    parameters = dict(norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias, eps=eps)
    tiles = dict(PIXELS=chosen.pixels)
    arguments = images | parameters | pixels_of(x, y) | sizes(x, y) | tiles
    programs = len(x) * triton.cdiv(arguments["pixels"], chosen.pixels)
    yield Launch(norm_pointwise_forward, programs, arguments | dict(ACTIVATION=activation), chosen.warps)


def backward(dx, gradients, dy, x, norm_weight, norm_bias, weight, bias, activation, eps) -> Iterator[Launch]:
    parts = 0
    if x.numel():
        chosen = configuration("norm_pointwise backward", x)
        ds = dy if activation is None else torch.empty_like(dy, memory_format=torch.channels_last)
        images = dict(dx=dx, dx_strides=dx.stride(), dy=dy, dy_strides=dy.stride(), x=x, x_strides=x.stride())
        images |= dict(ds=ds, ds_strides=ds.stride())
        parameters = dict(norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias, eps=eps)
        tiles = dict(PIXELS=chosen.pixels, ACTIVATION=activation)
        arguments = images | parameters | pixels_of(x, dy, dx, ds) | sizes(x, dy) | tiles
        programs = len(x) * triton.cdiv(arguments["pixels"], chosen.pixels)
        yield Launch(norm_pointwise_backward_input, programs, arguments, chosen.warps)
        parts = parts_of(x, "products")
    partial = new_partial(parts, gradients)
    if parts:
        yield products(partial, ds, x, weight, norm_weight, norm_bias, eps)
    yield add_parts(gradients, partial)


def sizes(x: Tensor, y: Tensor) -> dict:
    tiles = cut(x.shape[1])
    index = index_type(x.shape[2] * x.shape[3] + 2**16)
    options = dict(TILES=tiles, BLOCK=tiles[0], INDEX=index, PRECISION=precision())
    return dict(CHANNELS=x.shape[1], OUT_CHANNELS=y.shape[1]) | options


# Kernels


@triton.jit
def norm_pointwise_forward(
    y, y_strides, x, x_strides, norm_weight, norm_bias, weight, bias, eps, pixels, width,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    PIXELS: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = activation(LN(x) @ weight + bias), PIXELS pixels of an image."""
    image, first = tile_of(tl.program_id(0), pixels, PIXELS, INDEX)
    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < pixels
    seen = load_pixels(at(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, TILES)
    n = narrow_all(normalise(seen, eps, CHANNELS, TILES)[0], weight.dtype.element_ty)
    y_at = at(y, y_strides, image, pixel, width)
    for start in tl.range(0, OUT_CHANNELS, BLOCK, disable_licm=True):
        made = start + tl.arange(0, BLOCK)
        matrix, row = load_layer_after_norm(weight, bias, norm_weight, norm_bias, made, CHANNELS, TILES, OUT_CHANNELS)
        s = multiply(n, matrix, row, PRECISION)
        store_tile(y_at, y_strides, inside, activate(s, ACTIVATION), made, OUT_CHANNELS)


@triton.jit
def norm_pointwise_backward_input(
    dx, dx_strides, ds, ds_strides, dy, dy_strides, x, x_strides, norm_weight, norm_bias, weight, bias, eps,
    pixels, width,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    PIXELS: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and, with an activation, ds: of the same PIXELS pixels of an image."""
    image, first = tile_of(tl.program_id(0), pixels, PIXELS, INDEX)
    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < pixels
    seen = load_pixels(at(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, TILES)
    n, scale = normalise(seen, eps, CHANNELS, TILES)
    factor = narrow_all(n, weight.dtype.element_ty)
    dy_at, ds_at, dn = (
        at(dy, dy_strides, image, pixel, width),
        at(ds, ds_strides, image, pixel, width),
        zeros(PIXELS, TILES),
    )
    for start in tl.range(0, OUT_CHANNELS, BLOCK, disable_licm=True):
        made = start + tl.arange(0, BLOCK)
        matrix, row = load_layer_after_norm(weight, bias, norm_weight, norm_bias, made, CHANNELS, TILES, OUT_CHANNELS)
        gradient = load_tile(dy_at, dy_strides, inside, made, OUT_CHANNELS)
        if ACTIVATION is not None:
            s = multiply(factor, matrix, row, PRECISION)
            gradient = narrow(gradient.to(tl.float32) * slope(s, ACTIVATION), weight.dtype.element_ty)
            store_tile(ds_at, ds_strides, inside, gradient, made, OUT_CHANNELS)
        dn = multiply_block(gradient, transposed(matrix), dn, PRECISION)
    gradient = normalise_backward(dn, n, scale, CHANNELS)
    store_pixels(at(dx, dx_strides, image, pixel, width), dx_strides, inside, gradient, CHANNELS, TILES)

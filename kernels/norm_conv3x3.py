"""Triton kernels of `norm_conv3x3`; formula and shapes in `seemore_fast.reference.norm_conv3x3`.

    forward    n = LN(x), packed (`windows`), unless x is so already and there is no norm             one launch
               s = conv(n) + bias;  y = activation(s), or weight_pw @ activation(s) + bias_pw         one more
    backward   n again                                                                                one launch
               s again;  ds = (transposed weight_pw @ dy) * activation'(s);  activation(s)            one launch
               dn = conv of ds with the weight transposed and turned round;  dx, dgain and dshift     one launch
               sums over the pixels of ds times windows of n, and of dy times activation(s)           two launches
               the second stage of all these sums                                       three launches, or a shared one

What neighbours must see goes through memory: n and ds. Of 3 x 108 products for 36 outputs the matrix units make 3 x 112
for 48: 1.38 times what is needed for 36 channels, and nothing is wasted for 48 and 64. The weight's gradient takes 1.58
times what is needed for 36 and 1.04 for 48.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.planes import new_packed
from . import tiles as t
from . import windows as w
from .activation import activate, activation_of, slope
from .configurations import configuration
from .launch import Launch, launched, named
from .products import parts_of, products, steps_of
from .strided import index_type, strided
from .sums import add_parts, new_partial


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    channels = x.shape[1]
    vector, weight = x.new_empty(channels), x.new_empty(channels, channels, 3, 3)
    wide = torch.empty_like(x).repeat(1, 2, 1, 1), x.new_empty(2 * channels, channels, 1, 1), x.new_empty(2 * channels)
    for (y, *pointwise), norm, gelu in [
        (wide, vector, True),
        ((x, None, None), vector, False),
        ((x, None, None), None, True),
    ]:
        options = f"{y.shape[1]} {activation_of(gelu)}{' norm' if norm is not None else ''}"
        parameters = norm, norm, weight, vector, *pointwise
        yield from named("forward", forward(y, x, *parameters, gelu, 1e-6), options)
        yield from named("backward", backward(x, *parameters, y, x, *parameters, gelu, 1e-6), options)
    # The network's first layer, always of float32 at least.
    wide = dict(dtype=torch.promote_types(x.dtype, torch.float32))
    y, image = torch.empty_like(x, **wide), x.new_empty(len(x), 3, *x.shape[2:], **wide)
    first, vector = x.new_empty(channels, 3, 3, 3, **wide), x.new_empty(channels, **wide)
    parameters = None, None, first, vector, None, None
    yield from named("forward", forward(y, image, *parameters, False, 0.0), "of 3 channels")
    yield from named("forward", forward(y, image, *parameters, False, 0.0, add=True), "of 3 channels, added")
    yield from named("backward", backward(image, *parameters, y, image, *parameters, False, 0.0), "of 3 channels")


# What is launched


def forward(y, x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, gelu, eps, add=False) -> Iterator[Launch]:
    if x.numel() == 0:
        return
    n = yield from normalised(x, norm_weight, norm_bias, weight.dtype, eps)
    arguments = w.convolution(n, w.columns_of(weight)) | strided(y=y) | end(bias, weight_pw, y, gelu)
    arguments |= dict(bias_pw=bias_pw, ADD=add)
    yield t.over_tiles(norm_conv3x3_forward, "norm_conv3x3 forward", [y, n], arguments)


def forward_into(y, x, norm_weight, norm_bias, weight, bias, eps, add) -> Iterator[Launch]:
    """Yield what writes y, of any floating dtype, or adds to it."""
    return forward(y, x, norm_weight, norm_bias, weight, bias, None, None, False, eps, add)


def backward(
    dx, dnorm_weight, dnorm_bias, dweight, dbias, dweight_pw, dbias_pw, dy,
    x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, gelu, eps, residual=None, turned=None,
) -> Iterator[Launch]:  # fmt: skip
    """Yield what writes the gradients; `residual` is added to dx, which may be None.

    `turned` are the columns of the transposed weight turned round, if they are there already (`turned_columns`).
    """
    if x.numel() == 0:
        for gradient in (dnorm_weight, dnorm_bias, dweight, dbias, dweight_pw, dbias_pw):
            if gradient is not None:
                gradient.zero_()
        return
    n = yield from normalised(x, norm_weight, norm_bias, weight.dtype, eps)
    if not gelu and weight_pw is None:
        ds = yield from normalised(dy, None, None, weight.dtype, eps)
    else:
        ds = new_packed(x, len(weight), weight.dtype)
        acted = None if weight_pw is None else t.workspace(x, len(weight), weight.dtype)
        arguments = w.convolution(n, w.columns_of(weight)) | end(bias, weight_pw, dy, gelu)
        arguments |= strided(ds=ds, acted=acted, dy=dy)
        yield t.over_tiles(norm_conv3x3_backward_middle, "norm_conv3x3 backward", [dy, n], arguments)
    if dx is not None or norm_weight is not None:
        turned = turned_columns(weight) if turned is None else turned
        yield from backward_input(dx, [dnorm_weight, dnorm_bias], ds, x, norm_weight, turned, eps, residual)
    partial = new_partial(w.window_parts(n), [dweight, dbias])
    yield w.window_products(partial, ds, n)
    yield add_parts([dweight, dbias], partial)
    if weight_pw is not None:
        partial = new_partial(parts_of(acted, "products"), [dweight_pw, dbias_pw])
        yield products(partial, dy, acted)
        yield add_parts([dweight_pw, dbias_pw], partial)


norm_conv3x3, norm_conv3x3_into, norm_conv3x3_backward = map(launched, (forward, forward_into, backward))


def normalised(x, norm_weight, norm_bias, dtype, eps):
    """Return LN(x), or x without a norm, packed; yield the launch that this takes."""
    if norm_weight is None and x.dtype == dtype and w.is_packed(x):
        return x
    n = new_packed(x, x.shape[1], dtype)
    yield w.pack(n, x, norm_weight, norm_bias, eps)
    return n


def end(bias, weight_pw, y, gelu) -> dict:
    """Return as the kernels' arguments what comes after the convolution, on the way to y."""
    out = y.shape[1]
    block = t.cut(out)[0] if bias.element_size() == 2 else 16  # float32 takes more registers
    return dict(bias=bias, weight_pw=weight_pw, ACTIVATION=activation_of(gelu), RESULTS=out, BLOCK=block)


def turned_columns(weight: Tensor) -> Tensor:
    """Return the columns (3, 3D, C) of the weight with which the gradient's windows are multiplied."""
    return w.columns_of(weight.flip(2, 3).transpose(0, 1))


def backward_input(dx, dnorm, ds, x, norm_weight, turned, eps, residual) -> Iterator[Launch]:
    name = "norm_conv3x3 backward input"
    partial = None if norm_weight is None else new_partial(parts_of(ds, name), dnorm)
    pixels, *how = configuration(name, ds)
    arguments = w.convolution(ds, turned) | strided(dx=dx, x=x, residual=residual)
    arguments |= dict(partial=partial, gain=norm_weight, eps=eps)
    images = [image for image in (dx, x, residual) if image is not None]
    places = t.pixels_of(*images) | dict(steps=steps_of(ds, name))
    tile = dict(PIXELS=pixels, INDEX=index_type(places["pixels"] + 2**16))
    yield t.launch(norm_conv3x3_backward_input, parts_of(ds, name), arguments | places | tile, *how)
    if norm_weight is not None:
        yield add_parts(dnorm, partial)


# Kernels


@triton.jit(do_not_specialize=["lines", "line", "pixels", "width"])
def norm_conv3x3_forward(
    y, y_strides, n, n_stride, columns, bias, weight_pw, bias_pw, lines, line, pixels, width,
    CHANNELS: tl.constexpr, WINDOW: tl.constexpr, TURNS: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    RESULTS: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, ROOM: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = activation(conv(n) + bias), or weight_pw @ of it + bias_pw, PIXELS pixels of an image; to ADD, y += that."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    seen = w.image_of(n, n_stride, image)
    sums = w.convolve(seen, columns, pixel, inside, lines, line, CHANNELS, WINDOW, TURNS, OUT_CHANNELS, MADE, PRECISION)
    dtype: tl.constexpr = y.dtype.element_ty if weight_pw is None else weight_pw.dtype.element_ty
    acted = activate_all(sums, bias, ACTIVATION, dtype, OUT_CHANNELS, MADE)
    y_at = t.address(y, y_strides, image, pixel, width)
    if weight_pw is None:
        if ADD:
            acted = t.add(acted, t.load_pixels(y_at, y_strides, inside, OUT_CHANNELS, MADE))
        t.store_pixels(y_at, y_strides, inside, acted, OUT_CHANNELS, MADE)
    else:
        acted = t.round_all(acted, dtype)
        for start in tl.range(0, RESULTS, BLOCK, disable_licm=True):
            made = start + tl.arange(0, BLOCK)
            matrix = t.load_columns(weight_pw, 1, OUT_CHANNELS, made, OUT_CHANNELS, MADE, RESULTS)
            out = t.multiply(acted, matrix, t.load_row(bias_pw, made, RESULTS), PRECISION)
            t.store_tile(y_at, y_strides, inside, out, made, RESULTS)


@triton.jit(do_not_specialize=["lines", "line", "pixels", "width"])
def norm_conv3x3_backward_middle(
    ds, ds_strides, acted, acted_strides, dy, dy_strides, n, n_stride, columns, bias, weight_pw, lines, line,
    pixels, width,
    CHANNELS: tl.constexpr, WINDOW: tl.constexpr, TURNS: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    RESULTS: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, ROOM: tl.constexpr,
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds, packed, and with a pointwise what it multiplied: of the same PIXELS pixels of an image."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    dtype: tl.constexpr = ds.dtype.element_ty
    seen = w.image_of(n, n_stride, image)
    s = w.convolve(seen, columns, pixel, inside, lines, line, CHANNELS, WINDOW, TURNS, OUT_CHANNELS, MADE, PRECISION)
    dy_at = t.address(dy, dy_strides, image, pixel, width)
    if weight_pw is None:
        dacted = t.load_pixels(dy_at, dy_strides, inside, OUT_CHANNELS, MADE)
    else:
        acted_at = t.address(acted, acted_strides, image, pixel, None)
        multiplied = activate_all(s, bias, ACTIVATION, dtype, OUT_CHANNELS, MADE)
        t.store_pixels(acted_at, acted_strides, inside, multiplied, OUT_CHANNELS, MADE)
        dacted = t.zeros(PIXELS, MADE)
        for start in tl.range(0, RESULTS, BLOCK, disable_licm=True):
            made = start + tl.arange(0, BLOCK)
            matrix = t.load_columns(weight_pw, 1, OUT_CHANNELS, made, OUT_CHANNELS, MADE, RESULTS)
            gradient = t.load_tile(dy_at, dy_strides, inside, made, RESULTS)
            dacted = t.multiply_block(gradient, t.transposed(matrix), dacted, PRECISION)
    gradients = ()
    for i in tl.static_range(len(MADE)):
        row = t.load_row(bias, t.channels_of(MADE, i), OUT_CHANNELS)
        gradients += (dacted[i].to(tl.float32) * slope(s[i] + row, ACTIVATION, dtype),)
    w.store_packed(
        w.image_of(ds, ds_strides[0], image), pixel, inside, t.round_all(gradients, dtype), OUT_CHANNELS, MADE
    )


@triton.jit(do_not_specialize=["lines", "line", "width", "steps"])
def norm_conv3x3_backward_input(
    partial, dx, dx_strides, n, n_stride, columns, x, x_strides, residual, residual_strides, gain, eps, lines, line,
    pixels, width, steps,
    CHANNELS: tl.constexpr, WINDOW: tl.constexpr, TURNS: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx from n, which is ds here, and `residual`; partial[program] = sums over pixels of dgain and dshift, if any."""
    dgain, dshift = (), ()
    for i in tl.static_range(len(MADE)):
        dgain += (t.zero_row(MADE[i]),)
        dshift += (t.zero_row(MADE[i]),)
    image, start = t.tile_of(tl.program_id(0), pixels, PIXELS * steps, INDEX)
    ds = w.image_of(n, n_stride, image)
    for step in tl.range(0, steps, disable_licm=True):
        pixel = start + step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        dn = w.convolve(ds, columns, pixel, inside, lines, line, CHANNELS, WINDOW, TURNS, OUT_CHANNELS, MADE, PRECISION)
        if gain is not None:
            seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, OUT_CHANNELS, MADE)
            seen, scale = t.normalise(seen, eps, OUT_CHANNELS, MADE)
            dgain_before, dshift_before = dgain, dshift
            dgain, dshift = (), ()
            for i in tl.static_range(len(MADE)):
                dgain += (dgain_before[i] + tl.sum(dn[i] * seen[i], axis=0),)
                dshift += (dshift_before[i] + tl.sum(dn[i], axis=0),)
            dn = t.normalise_backward(t.times_row(dn, gain, OUT_CHANNELS, MADE), seen, scale, OUT_CHANNELS)
        if residual is not None:
            residual_at = t.address(residual, residual_strides, image, pixel, width)
            dn = t.add(dn, t.load_pixels(residual_at, residual_strides, inside, OUT_CHANNELS, MADE))
        if dx is not None:
            t.store_pixels(t.address(dx, dx_strides, image, pixel, width), dx_strides, inside, dn, OUT_CHANNELS, MADE)
    if gain is not None:
        partial += tl.program_id(0).to(tl.int64) * (2 * OUT_CHANNELS)
        for i in tl.static_range(len(MADE)):
            made = t.channels_of(MADE, i)
            tl.store(partial + made, dgain[i], mask=made < OUT_CHANNELS)
            tl.store(partial + OUT_CHANNELS + made, dshift[i], mask=made < OUT_CHANNELS)


@triton.jit
def activate_all(
    sums, bias, ACTIVATION: tl.constexpr, dtype: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr
):
    """Return activation(sums + bias), as float32 tiles, which are rounded to dtype later on."""
    out = ()
    for i in tl.static_range(len(MADE)):
        s = sums[i] + t.load_row(bias, t.channels_of(MADE, i), OUT_CHANNELS)
        out += (activate(s, ACTIVATION, dtype),)
    return out

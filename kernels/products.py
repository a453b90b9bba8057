"""The gradients of a pointwise layer's parameters, s = x @ weight + bias or s = LN(x) @ weight + bias, from x and ds.

A kernel of its own, for all operators with such layers: in one that also multiplies ds by the weight, Triton gives each
warp all of the sums. A program goes over some pixels of an image and leaves its sums to `add_parts`: those of dweight
and dbias, before them, with a norm, of its gain and shift.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .configurations import configuration
from .integers import cdiv
from .launch import Launch
from .rounding import round_to
from .strided import index_type

PARTS = 512  # programs, about: some for each multiprocessor, and few sums to add up later


def steps_of(x: Tensor, kernel: str) -> int:
    """Return how many tiles a program goes over."""
    tiles = cdiv(x.shape[2] * x.shape[3], configuration(kernel, x).pixels)
    return cdiv(tiles, max(1, PARTS // len(x)))


def parts_of(x: Tensor, kernel: str) -> int:
    """Return how many programs there are, each with a row of partial sums; `kernel` says whose tiles they go over."""
    return len(x) * cdiv(x.shape[2] * x.shape[3], configuration(kernel, x).pixels * steps_of(x, kernel))


def products(partial: Tensor, ds: Tensor, x: Tensor, weight=None, gain=None, shift=None, eps=0.0) -> Launch:
    """Describe the launch that writes partial; with a norm weight, gain, shift and eps are those of forward."""
    assert len(partial) == parts_of(x, "products"), f"partial has {len(partial)} rows: not made for x, {x.dtype}"
    pixels, *how = configuration("products", x)
    images = dict(partial=partial, ds=ds, ds_strides=ds.stride(), x=x, x_strides=x.stride())
    norm = dict(weight=weight, gain=gain, shift=shift, eps=eps)
    tiles = dict(CHANNELS=x.shape[1], SUMMED=t.cut(x.shape[1]), OUT_CHANNELS=ds.shape[1], MADE=t.powers(ds.shape[1]))
    factor = ds.dtype if weight is None else weight.dtype
    options = dict(PIXELS=pixels, INDEX=index_type(x.shape[2] * x.shape[3] + 2**16), PRECISION=t.precision(factor))
    arguments = images | norm | t.pixels_of(x, ds) | dict(steps=steps_of(x, "products")) | tiles | options
    return t.launch(add_products, len(partial), arguments, *how)


@triton.jit(do_not_specialize=["width", "steps"])
def add_products(
    partial, ds, ds_strides, x, x_strides, weight, gain, shift, eps, pixels, width, steps,
    CHANNELS: tl.constexpr, SUMMED: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[program] = sums over pixels of dgain and dshift (with a norm), dweight and dbias, in this order.

    With a norm, s = (gain * n + shift) @ W + bias. Only M = transposed ds @ n is summed over the pixels:
        dweight = gain * M + shift * dbias      dgain = columns of W * M      dshift = columns of W * dbias
    """
    FACTOR: tl.constexpr = ds.dtype.element_ty if gain is None else weight.dtype.element_ty
    sums = ()
    for j in tl.static_range(len(MADE)):
        for i in tl.static_range(len(SUMMED)):
            sums += (t.zero_tile(MADE[j], SUMMED[i]),)
    dbias = ()
    for j in tl.static_range(len(MADE)):
        dbias += (t.zero_row(MADE[j]),)
    image, start = t.tile_of(tl.program_id(0), pixels, PIXELS * steps, INDEX)
    for step in tl.range(0, steps, disable_licm=True):
        pixel = start + step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, SUMMED)
        gradient = t.load_pixels(t.address(ds, ds_strides, image, pixel, width), ds_strides, inside, OUT_CHANNELS, MADE)
        if gain is not None:
            seen, _ = t.normalise(seen, eps, CHANNELS, SUMMED)
        factor = t.round_all(seen, FACTOR)
        sums_before, dbias_before = sums, dbias
        sums, dbias = (), ()
        for j in tl.static_range(len(MADE)):
            for i in tl.static_range(len(SUMMED)):
                before = sums_before[j * len(SUMMED) + i]
                sums += (t.dot(tl.trans(round_to(gradient[j].to(tl.float32), FACTOR)), factor[i], before, PRECISION),)
            dbias += (dbias_before[j] + tl.sum(gradient[j].to(tl.float32), axis=0),)
    NORMS: tl.constexpr = 0 if gain is None else 2
    partial += tl.program_id(0).to(tl.int64) * (NORMS * CHANNELS + OUT_CHANNELS * (CHANNELS + 1))
    for i in tl.static_range(len(SUMMED)):
        channel = t.channels_of(SUMMED, i)
        real = channel < CHANNELS
        dgain = t.zero_row(SUMMED[i]).to(tl.float64)  # its terms nearly cancel
        dshift = t.zero_row(SUMMED[i]).to(tl.float64)
        for j in tl.static_range(len(MADE)):
            made = t.channels_of(MADE, j)[:, None]
            there = (made < OUT_CHANNELS) & real[None, :]
            dweight = sums[j * len(SUMMED) + i]
            if gain is not None:
                mixing = tl.load(weight + made * CHANNELS + channel[None, :], mask=there, other=0).to(tl.float64)
                dgain += tl.sum(mixing * dweight, axis=0)
                dshift += tl.sum(mixing * dbias[j][:, None], axis=0)
                dweight *= t.load_row(gain, channel, CHANNELS)
                dweight += dbias[j][:, None] * t.load_row(shift, channel, CHANNELS)
            tl.store(partial + (NORMS + made) * CHANNELS + channel[None, :], dweight, mask=there)
        if gain is not None:
            tl.store(partial + channel, dgain.to(tl.float32), mask=real)
            tl.store(partial + CHANNELS + channel, dshift.to(tl.float32), mask=real)
    for j in tl.static_range(len(MADE)):
        made = t.channels_of(MADE, j)
        tl.store(partial + (NORMS + OUT_CHANNELS) * CHANNELS + made, dbias[j], mask=made < OUT_CHANNELS)

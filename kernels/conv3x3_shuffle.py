"""Triton kernels of `conv3x3_shuffle`; formula and shapes in `seemore_fast.reference.conv3x3_shuffle`.

    forward    x, packed (`windows`), unless it is so already                              one launch
               y = pixel_shuffle(conv(x) + bias) / img_range + mean                        one more
    backward   dy, gathered from the pixels it was spread over; then as `norm_conv3x3`

A program has PIXELS pixels of x, and writes scale x scale times as many. For RGB at scale 4 the matrix units make 48
outputs, no more than are needed, at 2 and 3 16 of 12 and 32 of 27.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_conv3x3
from .configurations import configuration
from .integers import cdiv
from .launch import Launch, launched, named
from .strided import index_type, store
from .tiles import channels_of, launch, load_row, tile_of
from .windows import columns_of, convolution, convolve, image_of


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x, but of float32 at least; it may be on the meta device."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, channels, height, width = x.shape
    for scale in (2, 3, 4):
        made = 3 * scale**2
        y, mean = x.new_empty(batch, 3, scale * height, scale * width), x.new_empty(1, 3, 1, 1)
        weight, bias = x.new_empty(made, channels, 3, 3), x.new_empty(made)
        yield from named("forward", forward(y, x, weight, bias, mean, scale, 1.0), f"x{scale}")
        yield from named("backward", backward(x, weight, bias, y, x, weight, bias, scale, 1.0), f"x{scale}")


# What is launched


def forward(y, x, weight, bias, mean, scale, img_range) -> Iterator[Launch]:
    if x.numel() == 0:
        return
    n = yield from norm_conv3x3.normalised(x, None, None, weight.dtype, 0.0)
    pixels, *how = configuration("conv3x3_shuffle forward", n)
    arguments = convolution(n, columns_of(weight)) | dict(y=y, bias=bias, mean=mean, img_range=img_range, SCALE=scale)
    arguments |= dict(PIXELS=pixels, INDEX=index_type(n.shape[2] * n.shape[3] + pixels))
    yield launch(conv3x3_shuffle_forward, len(n) * cdiv(n.shape[2] * n.shape[3], pixels), arguments, *how)


def backward(dx, dweight, dbias, dy, x, weight, bias, scale, img_range) -> Iterator[Launch]:
    spread = (dy / img_range).unflatten(3, (-1, scale)).unflatten(2, (-1, scale))  # (B, I, H, scale, W, scale)
    ds = spread.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)  # (B, I * scale^2, H, W), packed
    gradients = dx, None, None, dweight, dbias, None, None
    yield from norm_conv3x3.backward(*gradients, ds, x, None, None, weight, bias, None, None, False, 0.0)


conv3x3_shuffle, conv3x3_shuffle_backward = launched(forward), launched(backward)


# Kernels


@triton.jit(do_not_specialize=["lines", "line"])
def conv3x3_shuffle_forward(
    y, n, n_stride, columns, bias, mean, img_range, lines, line,
    CHANNELS: tl.constexpr, WINDOW: tl.constexpr, TURNS: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr,
    SCALE: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = pixel_shuffle(conv(n) + bias) / img_range + mean, contiguous, for PIXELS pixels of an image."""
    pixels = lines.to(INDEX) * line
    image, first = tile_of(tl.program_id(0), pixels, PIXELS, INDEX)
    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < pixels
    seen = image_of(n, n_stride, image)
    sums = convolve(seen, columns, pixel, inside, lines, line, CHANNELS, WINDOW, TURNS, OUT_CHANNELS, MADE, PRECISION)
    row_stride = tl.full((), SCALE, tl.int64) * line
    channel_stride = row_stride * SCALE * lines
    row, column = (pixel // line * SCALE).to(tl.int64), (pixel % line * SCALE).to(tl.int64)
    y_at = image_of(y, channel_stride * (OUT_CHANNELS // (SCALE * SCALE)), image) + row * row_stride + column
    for i in tl.static_range(len(MADE)):
        made = channels_of(MADE, i)
        channel, down, right = made // (SCALE * SCALE), made // SCALE % SCALE, made % SCALE
        offset = channel.to(tl.int64) * channel_stride + down.to(tl.int64) * row_stride + right
        exists = made < OUT_CHANNELS
        s = sums[i] + load_row(bias, made, OUT_CHANNELS)
        out = s / img_range + tl.load(mean + channel, mask=exists, other=0)[None, :]
        store(y_at[:, None] + offset[None, :], out, inside[:, None] & exists[None, :])

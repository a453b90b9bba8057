"""Triton kernels of the gradients of `gated_ffn`'s gate, y = u * s with s = stencil(g) + bias.

    du = dy * s        dc = dy * u        dg = transposed stencil(dc)

One launch, and one more to add up the gradients of the parameters. A program goes down ROWS rows of a strip of an
image: the row of g that it reads goes into the three rows of s that see it, of which two are held as partial sums, and
likewise with dc and dg. So every pixel of g is read three times, shifted to both sides, and not nine. Shifted rows are
not aligned, and threads read them pixel by pixel: few pixels in each thread leave them side by side in memory for a
warp.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv, next_power_of_2
from .launch import Launch
from .strided import Tiles, locate_tile, over_planes, pixels_of, store, strided, tiles_of
from .sums import add_parts, new_partial

ROWS = 16  # of a strip, at most
STRIPS = 512  # pixels of a row of all strips of a program
EACH = 2  # of these, for a thread


def backward(du, dg, dweight, dbias, dy, u, g, weight, bias) -> Iterator[Launch]:
    """Yield what writes du, dg (B, C, H, W) and the gradients of the parameters."""
    parts = len(u) * strips_of(u)[1].of_a_plane if u.numel() else 0
    partial = new_partial(parts, [dweight, dbias])
    if u.numel():
        rows, tiles = strips_of(u)
        if weight.stride(2) != 3 * weight.stride(3):  # neither contiguous nor laid out
            weight = weight.contiguous()
        arguments = strided(du=du, dg=dg, dy=dy, u=u, g=g) | dict(weight=weight, bias=bias, partial=partial)
        arguments |= dict(height=u.shape[2], width=u.shape[3], ROWS=rows)
        arguments |= dict(weight_strides=(weight.stride(0), weight.stride(3)))
        yield over_planes(gate_backward, u, tiles, arguments)
    yield add_parts([dweight, dbias], partial)


def strips_of(x: Tensor) -> tuple[int, Tiles]:
    """Return how many rows a strip has, and tiles of strips x columns."""
    height, width = x.shape[2:]
    rows = min(ROWS, next_power_of_2(height))
    return rows, tiles_of(cdiv(height, rows), width, STRIPS, EACH)


# Kernels


@triton.jit(do_not_specialize=["height"])
def gate_backward(
    du, du_strides, dg, dg_strides, dy, dy_strides, u, u_strides, g, g_strides, weight, weight_strides, bias, partial,
    channels, height, width,
    ROWS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """du = dy * s, dg = transposed stencil(dc), and partial[part] = sums over a part of dc * g at each tap, and of dc.

    s = stencil(g) + bias and dc = dy * u. partial is (parts, 9 C + C).
    """
    WIDE: tl.constexpr = partial.dtype.element_ty
    batch, channel, part, line, column = locate_tile(channels, tl.cdiv(height, ROWS), width, LINES, COLUMNS)
    row = (line + tl.arange(0, LINES)[:, None]) * ROWS
    column += tl.arange(0, COLUMNS)[None, :]
    du_at = pixels_of(du, du_strides, batch, channel, row, column)
    dg_at = pixels_of(dg, dg_strides, batch, channel, row, column)
    dy_at = pixels_of(dy, dy_strides, batch, channel, row, column) - dy_strides[2]
    u_at = pixels_of(u, u_strides, batch, channel, row, column) - u_strides[2]
    g_at = pixels_of(g, g_strides, batch, channel, row, column) - g_strides[2]
    w = load_stencil(weight, weight_strides, channel, WIDE)
    shift = tl.load(bias + channel).to(WIDE)
    transposed = w[8], w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0]
    none = tl.zeros((LINES, COLUMNS), WIDE)
    s_sums, dg_sums = (none + shift, none + shift), (none, none)
    last_dy, last_dc, last_g = none, none, (none, none, none)  # of the row above
    products = none, none, none, none, none, none, none, none, none, none
    for r in tl.static_range(-1, ROWS + 1):
        left, here, right = load_around(g_at, g_strides, row + r, column, height, width)
        g_seen = left.to(WIDE), here.to(WIDE), right.to(WIDE)
        dy_left, dy_here, dy_right = load_around(dy_at, dy_strides, row + r, column, height, width)
        u_left, u_here, u_right = load_around(u_at, u_strides, row + r, column, height, width)
        dc_left, dc_right = dy_left.to(WIDE) * u_left.to(WIDE), dy_right.to(WIDE) * u_right.to(WIDE)
        dc = dy_here.to(WIDE) * u_here.to(WIDE)
        s, s_sums = next_row(s_sums, w, g_seen[0], g_seen[1], g_seen[2], shift)
        dg_row, dg_sums = next_row(dg_sums, transposed, dc_left, dc, dc_right, none)
        g_at += g_strides[2]
        dy_at += dy_strides[2]
        u_at += u_strides[2]
        if r > 0:
            inside = (row + (r - 1) < height) & (column < width)
            store(du_at, last_dy * s, inside)
            store(dg_at, dg_row, inside)
            du_at += du_strides[2]
            dg_at += dg_strides[2]
        if r == -1 or r == ROWS:
            dc = none  # another strip's
        products = add_products(products, last_dc, dc, last_g, g_seen)
        last_dy, last_dc, last_g = dy_here.to(WIDE), dc, g_seen
    to = partial + part.to(tl.int64) * (10 * channels)
    for tap in tl.static_range(9):
        tl.store(to + channel * 9 + tap, tl.sum(products[tap]))
    tl.store(to + channels * 9 + channel, tl.sum(products[9]))


@triton.jit
def load_stencil(weight, strides, channel, WIDE: tl.constexpr):
    """Return a channel's nine weights; strides are those of channels and taps."""
    w = ()
    for tap in tl.static_range(9):
        w += (tl.load(weight + channel * strides[0] + tap * strides[1]).to(WIDE),)
    return w


@triton.jit
def load_around(pixel, strides, row, column, height, width):
    """Return what is to the left of a pixel at (row, column), the pixel, and what is to the right; 0 for none."""
    exists = (row >= 0) & (row < height)
    left = tl.load(pixel - strides[3], mask=exists & (column > 0) & (column <= width), other=0)
    here = tl.load(pixel, mask=exists & (column < width), other=0)
    right = tl.load(pixel + strides[3], mask=exists & (column < width - 1), other=0)
    return left, here, right


@triton.jit
def next_row(sums, w, left, here, right, start):
    """Add a row to the three that see it. Return the one above, which is complete, and the sums of the other two."""
    above = sums[0] + w[6] * left + w[7] * here + w[8] * right
    beside = sums[1] + w[3] * left + w[4] * here + w[5] * right
    below = start + w[0] * left + w[1] * here + w[2] * right
    return above, (beside, below)


@triton.jit
def add_products(sums, last_dc, dc, last_g, g):
    """Add, for each tap and without one, a row's products with dc; where the tap sees the row below, the last row's."""
    return (
        sums[0] + dc * last_g[0], sums[1] + dc * last_g[1], sums[2] + dc * last_g[2],
        sums[3] + dc * g[0], sums[4] + dc * g[1], sums[5] + dc * g[2],
        sums[6] + last_dc * g[0], sums[7] + last_dc * g[1], sums[8] + last_dc * g[2],
        sums[9] + dc,
    )  # fmt: skip

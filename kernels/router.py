"""Triton kernels of `router`; formula and shapes in `seemore_fast.reference.router`.

    forward    sums over parts of the images, then mean, softmax and choice                      two launches
    backward   dlogits = p * (dp - sum(dp * p)), dmean and dweight, then dmean over all pixels   two launches

The sums can also be another operator's, and the gradient end at the mean: `router_from_sums` and its backward. Of
experts that are as probable the lower index comes first; NaN is larger than all.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv, next_power_of_2
from .launch import Launch, launched, named
from .strided import locate_tile, over_planes, pixels_of, store, strided, tiles_of

TILE, EACH = 4096, 16  # pixels of a program that pools or spreads, and of a thread of it
NUMBERS = 4096  # of the matrix of experts and channels that a program has at a time


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    batch, channels = x.shape[:2]
    sums, weight = new_sums(x), x.new_empty(3, channels)
    mean = sums.new_empty(batch, channels)
    index, chosen = x.new_empty((batch, 1), dtype=torch.int64), sums.new_empty(batch, 1)
    probability = sums.new_empty(batch, 3)
    pixels = x.shape[2] * x.shape[3]
    yield from named("pool", pool(sums, x))
    yield from named("route", route(index, chosen, mean, probability, sums, weight, pixels, 1))
    yield from named("route backward", route_backward(mean, weight, chosen, index, mean, probability, weight))
    yield from named("spread", spread(x, mean))


# What is launched


def forward(expert_index, expert_weight, mean, probability, a, weight, top_k) -> Iterator[Launch]:
    partial = new_sums(a)
    yield from pool(partial, a)
    yield from route(expert_index, expert_weight, mean, probability, partial, weight, a.shape[2] * a.shape[3], top_k)


def backward(da, dweight, dexpert_weight, expert_index, mean, probability, weight) -> Iterator[Launch]:
    dmean = torch.empty_like(mean)
    yield from route_backward(dmean, dweight, dexpert_weight, expert_index, mean, probability, weight)
    yield from spread(da, dmean)


def new_sums(a: Tensor) -> Tensor:
    """Return room for the sums of images in parts, (parts, B, C)."""
    parts = tiles(a).of_a_plane if a.numel() else 0
    return a.new_empty((parts, *a.shape[:2]), dtype=torch.promote_types(a.dtype, torch.float32))


def pool(partial: Tensor, a: Tensor) -> Iterator[Launch]:
    if a.numel():
        sizes = dict(partial=partial, height=a.shape[2], width=a.shape[3])
        yield over_planes(sum_tiles, a, tiles(a), strided(a=a) | sizes)


def spread(da: Tensor, dmean: Tensor) -> Iterator[Launch]:
    if da.numel():
        sizes = dict(dmean=dmean, height=da.shape[2], width=da.shape[3])
        yield over_planes(fill_tiles, da, tiles(da), strided(da=da) | sizes)


def route(expert_index, expert_weight, mean, probability, partial, weight, pixels, top_k) -> Iterator[Launch]:
    """Yield the choice by the sums of parts, (parts, B, C); without `mean`, partial has the means themselves."""
    parts, batch, _ = partial.shape
    if batch:
        results = dict(expert_index=expert_index, expert_weight=expert_weight, mean=mean, probability=probability)
        inputs = dict(partial=partial, weight=weight, parts=parts, batch=batch, pixels=pixels, top_k=top_k)
        yield Launch(choose, batch, results | inputs | matrix(weight))


def route_backward(dmean, dweight, dexpert_weight, expert_index, mean, probability, weight) -> Iterator[Launch]:
    batch, top_k = expert_index.shape
    tensors = dict(dmean=dmean, dweight=dweight, mean=mean, probability=probability, weight=weight)
    choice = dict(expert_index=expert_index, dexpert_weight=dexpert_weight, strides=dexpert_weight.stride())
    sizes = dict(batch=batch, top_k=top_k) | matrix(weight)
    yield Launch(choose_backward, cdiv(weight.shape[1], sizes["COLUMNS"]), tensors | choice | sizes)


router, router_from_sums = launched(forward), launched(route)
router_backward, router_from_sums_backward = launched(backward), launched(route_backward)


def tiles(a: Tensor):
    return tiles_of(*a.shape[2:], TILE, EACH)


def matrix(weight: Tensor) -> dict:
    """Return the sizes of the experts' matrix: all experts with as many channels as fit."""
    experts, channels = weight.shape
    rows = next_power_of_2(experts)
    columns = min(next_power_of_2(channels), max(1, NUMBERS // rows), 64)
    return dict(experts=experts, channels=channels, EXPERTS=rows, COLUMNS=columns)


# Kernels


@triton.jit(do_not_specialize=["channels", "height"])
def sum_tiles(a, a_strides, partial, channels, height, width, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """partial[tile, batch, channel] = sum over a tile of a's plane."""
    batch, channel, number, line, column = locate_tile(channels, height, width, LINES, COLUMNS)
    row, column = line + tl.arange(0, LINES)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    seen = tl.load(pixels_of(a, a_strides, batch, channel, row, column), mask=inside, other=0)
    planes = tl.num_programs(0) // tl.cdiv(height, LINES) // tl.cdiv(width, COLUMNS)
    tile = number - batch * (tl.cdiv(height, LINES) * tl.cdiv(width, COLUMNS))
    to = partial + tile.to(tl.int64) * planes + batch * channels + channel
    tl.store(to, tl.sum(seen.to(partial.dtype.element_ty)))


@triton.jit(do_not_specialize=["channels", "height"])
def fill_tiles(da, da_strides, dmean, channels, height, width, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """da = dmean / (height * width), a tile of a plane."""
    batch, channel, _, line, column = locate_tile(channels, height, width, LINES, COLUMNS)
    row, column = line + tl.arange(0, LINES)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    WIDE: tl.constexpr = dmean.dtype.element_ty
    share = tl.load(dmean + batch * channels + channel) / (tl.full((), 1, WIDE) * height * width)
    values = tl.zeros((LINES, COLUMNS), WIDE) + share
    store(pixels_of(da, da_strides, batch, channel, row, column), values, (row < height) & (column < width))


@triton.jit(do_not_specialize=["parts", "batch", "pixels"])
def choose(
    expert_index, expert_weight, mean, probability, partial, weight, parts, batch, pixels, top_k, experts, channels,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For one image: mean, probability = softmax(weight @ mean), and the top_k most probable experts."""
    WIDE: tl.constexpr = partial.dtype.element_ty
    image, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    logits = tl.zeros((EXPERTS,), WIDE)
    for start in tl.range(0, channels, COLUMNS):
        channel = start + tl.arange(0, COLUMNS)
        real = channel < channels
        total = tl.zeros((COLUMNS,), WIDE)
        for part in tl.range(0, parts):
            row = (tl.full((), 1, tl.int64) * part * batch + image) * channels
            total += tl.load(partial + row + channel, mask=real, other=0)
        total /= tl.full((), 1, WIDE) * pixels
        if mean is not None:
            tl.store(mean + image * channels + channel, total, mask=real)
        there = (expert < experts)[:, None] & real[None, :]
        share = tl.load(weight + expert[:, None] * channels + channel[None, :], mask=there, other=0)
        logits += tl.sum(share.to(WIDE) * total[None, :], axis=1)
    logits = tl.where(expert < experts, logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=0))
    p /= tl.sum(p, axis=0)
    tl.store(probability + image * experts + expert, p, mask=expert < experts)
    key = tl.where(p != p, float("inf"), p)  # NaN comes first
    key = tl.where(expert < experts, key, -1)
    for slot in tl.range(0, top_k):
        first = tl.min(tl.where(key == tl.max(key, axis=0), expert, EXPERTS), axis=0)
        to = image * top_k + slot
        tl.store(expert_index + to, first.to(tl.int64))
        tl.store(expert_weight + to, tl.sum(tl.where(expert == first, p, 0), axis=0))
        key = tl.where(expert == first, -1, key)


@triton.jit(do_not_specialize=["batch"])
def choose_backward(
    dmean, dweight, mean, probability, weight, expert_index, dexpert_weight, strides, batch, top_k, experts, channels,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dmean = dlogits @ weight for each image, dweight = sum over images of dlogits * mean; some channels."""
    WIDE: tl.constexpr = dmean.dtype.element_ty
    expert, channel = tl.arange(0, EXPERTS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = channel < channels
    there = (expert < experts)[:, None] & real[None, :]
    place = expert[:, None] * channels + channel[None, :]
    share = tl.load(weight + place, mask=there, other=0).to(WIDE)
    total = tl.zeros((EXPERTS, COLUMNS), WIDE)
    for image in tl.range(0, batch):
        p = tl.load(probability + image * experts + expert, mask=expert < experts, other=0)
        dp = tl.zeros((EXPERTS,), WIDE)
        for slot in tl.range(0, top_k):
            chosen = tl.load(expert_index + image * top_k + slot)
            gradient = tl.load(dexpert_weight + image * strides[0] + slot * strides[1])
            dp = tl.where(expert == chosen, gradient.to(WIDE), dp)
        dlogits = p * (dp - tl.sum(dp * p, axis=0))
        tl.store(dmean + image * channels + channel, tl.sum(dlogits[:, None] * share, axis=0), mask=real)
        pooled = tl.load(mean + image * channels + channel, mask=real, other=0)
        total += dlogits[:, None] * pooled[None, :]
    store(dweight + place, total, there)

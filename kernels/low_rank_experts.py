"""Triton kernels of `low_rank_experts`; formula and shapes in `seemore_fast.reference.low_rank_experts`.

    forward    rank_a = Wa_e @ a + ba_e;  rank_k = Wk_e @ k + bk_e
               m = a + sum over chosen e of p_e * (Wout_e @ (rank_a * rank_k) + bout_e)
               y = m or, with a projection, residual + weight_proj @ m + bias_proj                    one launch
    backward   da, dk, and of the ranks what the gradients of the parameters are sums of              one launch
               these sums and their second stage (`low_rank_experts_grads`)                         two launches

The experts of an image are read on the device. A program has PIXELS pixels of one and goes over the ranks of its
experts in blocks of 16 (`experts`), so that neither their number nor their ranks change what it takes. For rank 8 the
matrix units multiply 2.7 times what is needed at 36 channels and twice at 48; for the projection 1.8 times at 36.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .launch import Launch, launched, named
from .low_rank_experts_common import RANKS, blocks_of, load_bias, load_bias_out, load_ranks, locate
from .low_rank_experts_grads import add_sums, kept_ranks, new_sums, sum_products
from .rounding import round_to
from .strided import strided


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    batch, channels = x.shape[:2]
    ranks = (2, 4, 8)
    rows, square = x.new_empty(sum(ranks), channels), x.new_empty(channels, channels, 1, 1)
    packed = rows, rows[:, 0].contiguous(), rows, rows[:, 0].contiguous(), rows.t().contiguous(), rows[: len(ranks)]
    for top_k in (1, 2):
        index = x.new_full((batch, top_k), len(ranks) - 1, dtype=torch.int64)  # the largest expert, which takes longest
        weight = x.new_ones(batch, top_k, dtype=torch.float32)
        experts = index, weight, *packed, ranks
        for proj, bias, residual in ((None, None, None), (square, rows[0], x)):
            options = f"top {top_k}{'' if proj is None else ' proj'}"
            yield from named("forward", forward(x, x, x, *experts, proj, bias, residual), options)
            gradients = x, x, weight, *packed, proj, bias
            yield from named("backward", backward(*gradients, x, x, x, *experts, proj), options)


# What is launched


def forward(
    y, a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks,
    weight_proj, bias_proj, residual,
) -> Iterator[Launch]:  # fmt: skip
    if a.numel() == 0:
        return
    experts = mixture(expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks)
    arguments = strided(y=y, a=a, k=k, residual=residual) | dict(weight_proj=weight_proj, bias_proj=bias_proj)
    images = [image for image in (y, residual, k, a) if image is not None]
    yield t.over_tiles(low_rank_experts_forward, "low_rank_experts forward", images, arguments | experts | sizes(a))


def backward(
    da, dk, dexpert_weight, dweight_a, dbias_a, dweight_k, dbias_k, dweight_out, dbias_out, dweight_proj, dbias_proj,
    dy, a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks, weight_proj,
) -> Iterator[Launch]:  # fmt: skip
    gradients = dict(
        dexpert_weight=dexpert_weight, dweight_a=dweight_a, dbias_a=dbias_a, dweight_k=dweight_k, dbias_k=dbias_k,
        dweight_out=dweight_out, dbias_out=dbias_out, dweight_proj=dweight_proj, dbias_proj=dbias_proj,
    )  # fmt: skip
    experts = mixture(expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks)
    sums = new_sums(a, experts, weight_proj is not None)
    if a.numel():
        units, rows = experts["top_k"] * experts["BLOCKS"], kept_ranks(experts)
        ranked = t.workspace(a, units * 3 * rows, experts["weight_a"].dtype)
        arguments = strided(da=da, dk=dk, ranked=ranked, dy=dy, a=a, k=k) | dict(weight_proj=weight_proj, ROWS=rows)
        arguments |= experts | sizes(a) | dict(channels=a.shape[1])
        images = [da, dk, dy, k, a]
        yield t.over_tiles(low_rank_experts_backward_input, "low_rank_experts backward", images, arguments)
        yield sum_products(sums, ranked, dy, a, k, experts, weight_proj)
    yield add_sums(gradients, sums, a, experts)


low_rank_experts, low_rank_experts_backward = launched(forward), launched(backward)


def mixture(expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks) -> dict:
    """Return experts and which are chosen as the kernels' arguments."""
    routing = dict(expert_index=expert_index, expert_weight=expert_weight, top_k=expert_index.shape[1])
    parameters = dict(weight_a=weight_a, bias_a=bias_a, weight_k=weight_k, bias_k=bias_k)
    sizes = dict(EXPERTS=tuple(ranks), BLOCKS=blocks_of(ranks), TOTAL=sum(ranks), PRECISION=t.precision(weight_a.dtype))
    return routing | parameters | dict(weight_out=weight_out, bias_out=bias_out) | sizes


def sizes(a: Tensor) -> dict:
    return dict(CHANNELS=a.shape[1], TILES=t.cut(a.shape[1]))


# Kernels


@triton.jit(do_not_specialize=["pixels", "width"])
def low_rank_experts_forward(
    y, y_strides, a, a_strides, k, k_strides, residual, residual_strides, expert_index, expert_weight, top_k,
    weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, weight_proj, bias_proj, pixels, width,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, TOTAL: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
    PIXELS: tl.constexpr, ROOM: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of PIXELS pixels of an image."""
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    dtype: tl.constexpr = weight_a.dtype.element_ty
    seen = t.load_pixels(t.address(a, a_strides, image, pixel, width), a_strides, inside, CHANNELS, TILES)
    of_k = t.load_pixels(t.address(k, k_strides, image, pixel, width), k_strides, inside, CHANNELS, TILES)
    of_a, of_k, out = t.round_all(seen, dtype), t.round_all(of_k, dtype), t.round_all(seen, tl.float32)
    for unit in tl.range(0, top_k * BLOCKS, disable_licm=True):
        slot, block = image * top_k + unit // BLOCKS, unit % BLOCKS
        expert, p, begins, row, own = locate(expert_index, expert_weight, slot, block, EXPERTS)
        matrix_a = load_ranks(weight_a, row, own, CHANNELS, 1, CHANNELS, TILES)
        matrix_k = load_ranks(weight_k, row, own, CHANNELS, 1, CHANNELS, TILES)
        rank_a = t.multiply(of_a, matrix_a, load_bias(bias_a, row, own), PRECISION)
        rank_k = t.multiply(of_k, matrix_k, load_bias(bias_k, row, own), PRECISION)
        matrix_out = t.transposed(load_ranks(weight_out, row, own, 1, TOTAL, CHANNELS, TILES))
        out = t.multiply_block(round_to(rank_a * rank_k * p, dtype), matrix_out, out, PRECISION)
        out = add_bias_out(out, p, bias_out, expert, begins, CHANNELS, TILES)
    y_at = t.address(y, y_strides, image, pixel, width)
    if weight_proj is None:
        t.store_pixels(y_at, y_strides, inside, out, CHANNELS, TILES)
    else:
        mixed = t.round_all(out, dtype)
        residual_at = t.address(residual, residual_strides, image, pixel, width)
        for start in tl.range(0, CHANNELS, TILES[0], disable_licm=True):
            made = start + tl.arange(0, TILES[0])
            matrix = t.load_columns(weight_proj, 1, CHANNELS, made, CHANNELS, TILES, CHANNELS)
            projected = t.multiply(mixed, matrix, t.load_row(bias_proj, made, CHANNELS), PRECISION)
            more = t.load_tile(residual_at, residual_strides, inside, made, CHANNELS).to(tl.float32)
            t.store_tile(y_at, y_strides, inside, projected + more, made, CHANNELS)


@triton.jit
def add_bias_out(tiles, p, bias_out, expert, begins, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    out = ()
    for i in tl.static_range(len(TILES)):
        out += (tiles[i] + p * load_bias_out(bias_out, expert, begins, t.channels_of(TILES, i), CHANNELS),)
    return out


@triton.jit(do_not_specialize=["pixels", "width"])
def low_rank_experts_backward_input(
    da, da_strides, dk, dk_strides, ranked, ranked_strides, dy, dy_strides, a, a_strides, k, k_strides,
    expert_index, expert_weight, top_k, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, weight_proj,
    pixels, width, channels,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    TILES: tl.constexpr, PIXELS: tl.constexpr, ROOM: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da and dk of PIXELS pixels of an image, and for `sum_products` 3 * ROWS channels of each unit.

    With dm the gradient of m, these are rank_a * rank_k and the gradients of rank_a and rank_k,
        p_e * (transposed Wout_e @ dm) * rank_k  and  p_e * (transposed Wout_e @ dm) * rank_a.
    """
    image, pixel, inside = t.locate_pixels(pixels, PIXELS, ROOM, INDEX)
    dtype: tl.constexpr = weight_a.dtype.element_ty
    a_at, k_at = t.address(a, a_strides, image, pixel, width), t.address(k, k_strides, image, pixel, width)
    dy_at = t.address(dy, dy_strides, image, pixel, width)
    ranked_at = t.address(ranked, ranked_strides, image, pixel, width)
    if weight_proj is None:
        from_a = t.round_all(t.load_pixels(dy_at, dy_strides, inside, CHANNELS, TILES), tl.float32)
    else:
        from_a = t.zeros(PIXELS, TILES)
        for start in tl.range(0, channels, TILES[0], disable_licm=True):  # not a constant: LLVM would unroll it
            made = start + tl.arange(0, TILES[0])
            gradient = round_to(t.load_tile(dy_at, dy_strides, inside, made, CHANNELS).to(tl.float32), dtype)
            matrix = t.load_columns(weight_proj, 1, CHANNELS, made, CHANNELS, TILES, CHANNELS)
            from_a = t.multiply_block(gradient, t.transposed(matrix), from_a, PRECISION)
    dm, from_k = t.round_all(from_a, dtype), t.zeros(PIXELS, TILES)
    for unit in tl.range(0, top_k * BLOCKS, disable_licm=True):
        slot, block = image * top_k + unit // BLOCKS, unit % BLOCKS
        _, p, _, row, own = locate(expert_index, expert_weight, slot, block, EXPERTS)
        place, kept = ranked_at + unit * (3 * ROWS), tl.arange(0, RANKS)
        matrix = load_ranks(weight_out, row, own, 1, TOTAL, CHANNELS, TILES)
        drank = t.multiply(dm, matrix, tl.zeros((1, RANKS), tl.float32), PRECISION) * p
        # Images and weights are loaded again and again: what is kept in registers, float32 keeps in two parts each.
        of_k = t.round_all(t.load_pixels(k_at, k_strides, inside, CHANNELS, TILES), dtype)
        matrix = load_ranks(weight_k, row, own, CHANNELS, 1, CHANNELS, TILES)
        rank_k = t.multiply(of_k, matrix, load_bias(bias_k, row, own), PRECISION)
        drank_a = round_to(drank * rank_k, dtype)
        t.store_tile(place + ROWS, ranked_strides, inside, drank_a, kept, ROWS)
        of_a = t.round_all(t.load_pixels(a_at, a_strides, inside, CHANNELS, TILES), dtype)
        matrix = load_ranks(weight_a, row, own, CHANNELS, 1, CHANNELS, TILES)
        rank_a = t.multiply(of_a, matrix, load_bias(bias_a, row, own), PRECISION)
        drank_k = round_to(drank * rank_a, dtype)
        from_a = t.multiply_block(drank_a, t.transposed(matrix), from_a, PRECISION)
        t.store_tile(place, ranked_strides, inside, rank_a * rank_k, kept, ROWS)
        t.store_tile(place + 2 * ROWS, ranked_strides, inside, drank_k, kept, ROWS)
        matrix = load_ranks(weight_k, row, own, CHANNELS, 1, CHANNELS, TILES)
        from_k = t.multiply_block(drank_k, t.transposed(matrix), from_k, PRECISION)
    t.store_pixels(t.address(da, da_strides, image, pixel, width), da_strides, inside, from_a, CHANNELS, TILES)
    t.store_pixels(t.address(dk, dk_strides, image, pixel, width), dk_strides, inside, from_k, CHANNELS, TILES)

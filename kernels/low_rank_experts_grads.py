"""The gradients of `low_rank_experts`'s parameters, from a, k, dy and what `low_rank_experts_backward_input` keeps.

With q = rank_a * rank_k, all are sums over the pixels of products of two images, and small products of these sums:

    dweight_a_e = drank_a @ transposed a,  dweight_k_e = drank_k @ transposed k,  and the sums of drank_a and drank_k
    M = dy @ transposed q,                        s = the sum of dy
    D = transposed weight_proj @ M,               d = transposed weight_proj @ s     (without a projection, M and s)
    dweight_out_e = p_e * D,  dbias_out_e = p_e * d,  dp_e = sum(weight_out_e * D) + sum(bias_out_e * d)
    dweight_proj = dy @ transposed a + sum of p_e * (M @ transposed weight_out_e + s @ transposed bias_out_e)

A kernel of its own sums over the pixels: in one that also has chains of products for each pixel, Triton gives each warp
all of the sums. A program goes over some pixels of an image for one unit (`experts`) and leaves a row of sums. The last
launch adds up, for each expert, the rows of the units that chose it, in an order that depends on the sizes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .configurations import configuration
from .integers import cdiv
from .launch import Launch
from .low_rank_experts_common import RANKS, load_bias_out, load_some, locate, rows_of
from .products import steps_of
from .rounding import round_to
from .strided import index_type, strided

KERNEL = "low_rank_experts products"  # in the table of configurations
COLUMNS, PARTS = 32, 128  # sums that a program of the last launch adds up, and of how many rows at a time


def kept_ranks(experts: dict) -> int:
    """Return how many ranks of a block pass through memory: 8 if no expert has more."""
    return 8 if max(experts["EXPERTS"]) <= 8 else RANKS.value


def new_sums(a: Tensor, experts: dict, projected: bool) -> Tensor:
    """Return room for rows of sums (B, top_k, blocks, parts, sums), which start at multiples of 16."""
    batch, channels, height, width = a.shape
    of_a_part = configuration(KERNEL, a).pixels * steps_of(a, KERNEL) if batch else 1
    parts = cdiv(height * width, of_a_part) if batch else 0
    count = of_expert(channels, kept_ranks(experts)) + 1 + projected * channels * (channels + 1)
    shape = batch, experts["top_k"], experts["BLOCKS"], parts, 16 * cdiv(count, 16)
    return a.new_empty(shape, dtype=torch.float32)


def sum_products(sums: Tensor, ranked: Tensor, dy, a, k, experts: dict, weight_proj: Tensor | None) -> Launch:
    """Describe the launch that writes sums."""
    pixels, *how = configuration(KERNEL, a)
    channels, places = a.shape[1], t.pixels_of(dy, a, k)
    images = strided(ranked=ranked, dy=dy, a=a, k=k)
    taken = ("expert_index", "expert_weight", "top_k", "weight_out", "bias_out")
    taken += ("EXPERTS", "BLOCKS", "TOTAL", "PRECISION")
    parameters = {name: experts[name] for name in taken} | dict(weight_proj=weight_proj)
    steps = steps_of(a, KERNEL)
    sizes = dict(CHANNELS=channels, TILES=t.powers(channels), ROWS=kept_ranks(experts))
    options = dict(PIXELS=pixels, INDEX=index_type(places["pixels"] + pixels * steps))
    arguments = dict(sums=sums, count=sums.shape[4], steps=steps) | images | places | parameters | sizes | options
    return t.launch(add_products, sums.shape[:4].numel(), arguments, *how)


def add_sums(gradients: dict[str, Tensor | None], sums: Tensor, a: Tensor, experts: dict) -> Launch:
    """Describe the launch that writes all gradients, each contiguous; without images those of parameters are zero."""
    batch, top_k, blocks, parts, count = sums.shape
    channels, rows = a.shape[1], kept_ranks(experts)
    known = dict(sums=sums, expert_index=experts["expert_index"], slots=batch * top_k, parts=parts, count=count)
    sizes = {name: experts[name] for name in ("EXPERTS", "BLOCKS", "TOTAL")} | dict(ROWS=rows, CHANNELS=channels)
    programs = len(experts["EXPERTS"]) * blocks * cdiv(of_expert(channels, rows), COLUMNS) + batch * top_k
    if gradients["dweight_proj"] is not None:
        programs += cdiv(channels * (channels + 1), COLUMNS)
    arguments = gradients | known | sizes | dict(COLUMNS=COLUMNS, PARTS=PARTS)
    # Left to itself, ptxas spills some registers for more warps at a time (sm_100).
    return Launch(add_up, programs, arguments, more_options={"maxnreg": 255})


# Kernels


@triton.constexpr_function
def of_expert(channels, rows):
    """Return how many sums a row begins with that belong to an expert; dp_e and those of the projection follow."""
    return rows * (3 * channels + 2) + channels


@triton.jit(do_not_specialize=["width", "steps"])
def add_products(
    sums, count, ranked, ranked_strides, dy, dy_strides, a, a_strides, k, k_strides, expert_index, expert_weight, top_k,
    weight_out, bias_out, weight_proj, pixels, width, steps,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    TILES: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A row of sums: of (ROWS, CHANNELS) each dweight_a, dweight_k and transposed dweight_out, dbias_a and dbias_k
    (ROWS,), dbias_out (CHANNELS,), dp; dweight_proj (CHANNELS, CHANNELS) and dbias_proj."""
    image, first = t.tile_of(tl.program_id(0), pixels, PIXELS * steps, INDEX)
    unit = image % (top_k * BLOCKS)
    image = image // (top_k * BLOCKS)
    dtype: tl.constexpr = weight_out.dtype.element_ty
    rank = tl.arange(0, RANKS)
    sums += tl.program_id(0).to(tl.int64) * count
    ones = tl.full((PIXELS, RANKS), 1, dtype)  # a factor that gives sums over the pixels, in each column

    # In two loops, because the registers do not suffice for all sums at a time.
    of_a, of_k = columns(TILES), columns(TILES)
    sum_a, sum_k = t.zeros(RANKS, (RANKS, RANKS))
    for step in tl.range(0, steps, disable_licm=True):
        pixel = first + step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        ranked_at = t.address(ranked, ranked_strides, image, pixel, width) + unit * (3 * ROWS)
        drank_a = t.load_tile(ranked_at + ROWS, ranked_strides, inside, rank, ROWS)
        drank_k = t.load_tile(ranked_at + 2 * ROWS, ranked_strides, inside, rank, ROWS)
        seen_a = t.load_pixels(t.address(a, a_strides, image, pixel, width), a_strides, inside, CHANNELS, TILES)
        of_a = add_product(t.round_all(seen_a, dtype), drank_a, of_a, PRECISION)
        seen_k = t.load_pixels(t.address(k, k_strides, image, pixel, width), k_strides, inside, CHANNELS, TILES)
        of_k = add_product(t.round_all(seen_k, dtype), drank_k, of_k, PRECISION)
        sum_a = t.dot(tl.trans(drank_a), ones, sum_a, PRECISION)
        sum_k = t.dot(tl.trans(drank_k), ones, sum_k, PRECISION)
    for i in tl.static_range(len(TILES)):
        channel = t.channels_of(TILES, i)
        store_matrix(sums, of_a[i], channel, 1, CHANNELS, rank, CHANNELS, ROWS)
        store_matrix(sums + ROWS * CHANNELS, of_k[i], channel, 1, CHANNELS, rank, CHANNELS, ROWS)
    store_matrix(sums + 3 * ROWS * CHANNELS, sum_a, rank, 1, ROWS, rank, 0, 1)
    store_matrix(sums + (3 * CHANNELS + 1) * ROWS, sum_k, rank, 1, ROWS, rank, 0, 1)

    of_q, sum_dy, dproj = columns(TILES), columns(TILES), ()
    for i in tl.static_range(len(TILES)):
        dproj += t.zeros(TILES[i], TILES)
    for step in tl.range(0, steps, disable_licm=True):
        pixel = first + step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        upstream = t.load_pixels(t.address(dy, dy_strides, image, pixel, width), dy_strides, inside, CHANNELS, TILES)
        upstream = t.round_all(upstream, dtype)
        ranked_at = t.address(ranked, ranked_strides, image, pixel, width) + unit * (3 * ROWS)
        q = t.load_tile(ranked_at, ranked_strides, inside, rank, ROWS)
        of_q = add_product(upstream, q, of_q, PRECISION)
        sum_dy = add_product(upstream, ones, sum_dy, PRECISION)
        if weight_proj is not None:
            seen_a = t.load_pixels(t.address(a, a_strides, image, pixel, width), a_strides, inside, CHANNELS, TILES)
            seen_a = t.round_all(seen_a, dtype)
            before, dproj = dproj, ()
            for i in tl.static_range(len(TILES)):
                for j in tl.static_range(len(TILES)):
                    dproj += (t.dot(tl.trans(upstream[i]), seen_a[j], before[i * len(TILES) + j], PRECISION),)

    OF_EXPERT: tl.constexpr = of_expert(CHANNELS, ROWS)
    slot, block = image * top_k + unit // BLOCKS, unit % BLOCKS
    expert, p, begins, row, own = locate(expert_index, expert_weight, slot, block, EXPERTS)
    out, bias, total = (), (), ()
    for i in tl.static_range(len(TILES)):
        channel = t.channels_of(TILES, i)
        out += (load_some(weight_out, row, own, 1, TOTAL, channel, CHANNELS).to(tl.float32),)
        bias += (load_bias_out(bias_out, expert, begins, channel, CHANNELS),)
        total += (tl.sum(sum_dy[i], axis=1, keep_dims=True) * (1 / RANKS),)
    dp = tl.full((), 0, tl.float32)
    if weight_proj is None:
        for i in tl.static_range(len(TILES)):
            store_out(sums, p, begins, of_q[i], total[i], t.channels_of(TILES, i), rank, ROWS, CHANNELS)
            dp += tl.sum(out[i] * of_q[i]) + tl.sum(tl.trans(bias[i]) * total[i])
    else:
        proj_at = sums + OF_EXPERT + 1
        of_first = tl.where(unit == 0, 1.0, 0.0)
        for i in tl.static_range(len(TILES)):
            channel = t.channels_of(TILES, i)
            store_matrix(
                proj_at + CHANNELS * CHANNELS, of_first * total[i], channel, 1, CHANNELS, tl.arange(0, 1), 0, 1
            )
            for j in tl.static_range(len(TILES)):
                before = of_first * dproj[i * len(TILES) + j] + p * total[i] * bias[j]
                dweight = t.dot(p * of_q[i], tl.trans(out[j]), before, PRECISION)
                store_matrix(proj_at, dweight, channel, CHANNELS, CHANNELS, t.channels_of(TILES, j), 1, CHANNELS)
        for start in tl.range(0, CHANNELS, RANKS, disable_licm=True):
            made = start + tl.arange(0, RANKS)
            proj = t.load_columns(weight_proj, CHANNELS, 1, made, CHANNELS, TILES, CHANNELS)
            dout, dbias = tl.zeros((RANKS, RANKS), tl.float32), tl.zeros((1, RANKS), tl.float32)
            for i in tl.static_range(len(TILES)):
                dout = t.dot(tl.trans(proj[i].to(tl.float32)), of_q[i], dout, PRECISION)
                dbias += tl.sum(proj[i].to(tl.float32) * total[i], axis=0, keep_dims=True)
            dbias = tl.trans(dbias)
            store_out(sums, p, begins, dout, dbias, made, rank, ROWS, CHANNELS)
            out_block = load_some(weight_out, row, own, 1, TOTAL, made, CHANNELS).to(tl.float32)
            bias_block = load_bias_out(bias_out, expert, begins, made, CHANNELS)
            dp += tl.sum(out_block * dout) + tl.sum(tl.trans(bias_block) * dbias)
    tl.store(sums + OF_EXPERT, dp)


@triton.jit
def columns(TILES: tl.constexpr):
    """Return float32 tiles (TILES[i], RANKS) of zeros."""
    out = ()
    for i in tl.static_range(len(TILES)):
        out += (t.zero_tile(TILES[i], RANKS),)
    return out


@triton.jit
def add_product(x, y, sums, PRECISION: tl.constexpr):
    """Return the tiles sums + transposed x @ y."""
    out = ()
    for i in tl.static_range(len(x)):
        out += (t.dot(tl.trans(x[i]), y, sums[i], PRECISION),)
    return out


@triton.jit
def store_out(sums, p, begins, dout, dbias, channel, rank, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write some channels of dweight_out (channels, RANKS) and of dbias_out (channels, 1)."""
    store_matrix(sums + 2 * ROWS * CHANNELS, p * dout, channel, 1, CHANNELS, rank, CHANNELS, ROWS)
    place = sums + ROWS * (3 * CHANNELS + 2)
    store_matrix(place, p * begins * dbias, channel, 1, CHANNELS, tl.arange(0, 1), 0, 1)


@triton.jit
def store_matrix(pointer, values, row, row_stride, HEIGHT: tl.constexpr, column, column_stride, WIDTH: tl.constexpr):
    there = (row < HEIGHT)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * row_stride + column[None, :] * column_stride, values, mask=there)


@triton.jit(do_not_specialize=["slots", "parts"])
def add_up(
    dexpert_weight, dweight_a, dbias_a, dweight_k, dbias_k, dweight_out, dbias_out, dweight_proj, dbias_proj,
    sums, expert_index, slots, parts, count,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """First come programs for the sums of each block of each expert, then one for each dp, then the projection's."""
    OF_EXPERT: tl.constexpr = of_expert(CHANNELS, ROWS)
    CHUNKS: tl.constexpr = (OF_EXPERT + COLUMNS - 1) // COLUMNS
    OF_EXPERTS: tl.constexpr = len(EXPERTS) * BLOCKS * CHUNKS
    program, j = tl.program_id(0), tl.arange(0, COLUMNS)
    of_slot = BLOCKS * parts
    if program < OF_EXPERTS:
        j += program % CHUNKS * COLUMNS
        expert, block = program // CHUNKS // BLOCKS, program // CHUNKS % BLOCKS
        total = add_rows(
            sums, count, 0, slots * of_slot, j, OF_EXPERT, expert_index, expert, block, parts, BLOCKS, PARTS
        )
        first, rank = rows_of(expert, EXPERTS)
        first, rank = first + block * RANKS, tl.minimum(rank - block * RANKS, ROWS)
        put(dweight_a + first * CHANNELS + j, total, j, rank * CHANNELS)
        j -= ROWS * CHANNELS
        put(dweight_k + first * CHANNELS + j, total, j, rank * CHANNELS)
        j -= ROWS * CHANNELS
        put(dweight_out + first + j % CHANNELS * TOTAL + j // CHANNELS, total, j, rank * CHANNELS)
        j -= ROWS * CHANNELS
        put(dbias_a + first + j, total, j, rank)
        j -= ROWS
        put(dbias_k + first + j, total, j, rank)
        j -= ROWS
        put(dbias_out + expert * CHANNELS + j, total, j, tl.where(block == 0, CHANNELS, 0))
    elif program < OF_EXPERTS + slots:
        slot = program - OF_EXPERTS
        begin = slot * of_slot
        total = add_rows(
            sums, count, begin, begin + of_slot, OF_EXPERT + j, OF_EXPERT + 1, None, 0, 0, parts, BLOCKS, PARTS
        )
        put(dexpert_weight + slot + j, total, j, 1)
    elif dweight_proj is not None:
        SQUARE: tl.constexpr = CHANNELS * CHANNELS
        j += (program - OF_EXPERTS - slots) * COLUMNS
        end = OF_EXPERT + 1 + SQUARE + CHANNELS
        total = add_rows(sums, count, 0, slots * of_slot, OF_EXPERT + 1 + j, end, None, 0, 0, parts, BLOCKS, PARTS)
        put(dweight_proj + j, total, j, SQUARE)
        put(dbias_proj + j - SQUARE, total, j - SQUARE, CHANNELS)


@triton.jit
def add_rows(
    sums, count, begin, end, column, last, expert_index, expert, block, parts,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return the sums of columns, before `last`, of rows begin to end: if an index is given, those of a block of an
    expert."""
    total = tl.zeros((PARTS, column.shape[0]), tl.float32)
    for first in range(begin, end, PARTS):
        row = first + tl.arange(0, PARTS)
        there = row < end
        if expert_index is not None:
            unit = row // parts
            chosen = tl.load(expert_index + unit // BLOCKS, mask=there, other=-1)
            there = there & (chosen == expert) & (unit % BLOCKS == block)
        pointers = sums + row.to(tl.int64)[:, None] * count + column[None, :]
        total += tl.load(pointers, mask=there[:, None] & (column < last)[None, :], other=0)
    return tl.sum(total, axis=0)


@triton.jit
def put(pointers, values, j, end):
    tl.store(pointers, round_to(values, pointers.dtype.element_ty), mask=(j >= 0) & (j < end))

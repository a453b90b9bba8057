"""Blocks of 16 ranks of an image's experts, cut out of the packed parameters and padded in registers.

Unit u of an image is block u % BLOCKS of the expert in its slot u // BLOCKS: as many blocks for each as the largest
rank has.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from .integers import cdiv
from .tiles import channels_of, start

RANKS = tl.constexpr(16)  # of a block: what tl.dot sums over at least


def blocks_of(ranks: Sequence[int]) -> int:
    return cdiv(max(ranks), RANKS.value)


@triton.jit
def rows_of(expert, EXPERTS: tl.constexpr):
    """Return the first packed row of an expert and how many it has; EXPERTS are the ranks of all. Others have none."""
    first, rank = 0, 0
    for e in tl.static_range(len(EXPERTS)):
        first = tl.where(expert == e, start(EXPERTS, e), first)
        rank = tl.where(expert == e, EXPERTS[e], rank)
    return first, rank


@triton.jit
def locate(expert_index, expert_weight, slot, block, EXPERTS: tl.constexpr):
    """Return the expert in a slot, its probability, whether it begins with the block (1 or 0), and the block's packed
    rows (RANKS,) and which of them are its own.

    An index that is no expert's has no rows, begins nowhere and has the probability 0.
    """
    expert = tl.load(expert_index + slot)
    first, rank = rows_of(expert, EXPERTS)
    probability = tl.where(rank > 0, tl.load(expert_weight + slot).to(tl.float32), 0)
    row = block * RANKS + tl.arange(0, RANKS)
    begins = (block < tl.minimum(rank, 1)).to(tl.int32)
    return expert, probability, begins, first + row, row < rank


@triton.jit
def load_ranks(weight, row, own, row_stride, column_stride, CHANNELS: tl.constexpr, TILES: tl.constexpr):
    """Return rows of packed weights (R, CHANNELS), whose strides are given, as tiles (TILES[i], RANKS)."""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles += (load_some(weight, row, own, row_stride, column_stride, channels_of(TILES, i), CHANNELS),)
    return tiles


@triton.jit
def load_some(weight, row, own, row_stride, column_stride, channel, CHANNELS: tl.constexpr):
    """Return some channels of rows of packed weights (R, CHANNELS), whose strides are given: (channels, RANKS)."""
    there = (channel < CHANNELS)[:, None] & own[None, :]
    return tl.load(weight + channel[:, None] * column_stride + row[None, :] * row_stride, mask=there, other=0)


@triton.jit
def load_bias(bias, row, own):
    """Return rows of packed biases (R,) in float32, as a row (1, RANKS)."""
    return tl.load(bias + row, mask=own, other=0).to(tl.float32)[None, :]


@triton.jit
def load_bias_out(bias_out, expert, begins, channel, CHANNELS: tl.constexpr):
    """Return some channels of an expert's bias in float32, as a row (1, channels), with its first block only."""
    there = channel < begins * CHANNELS
    return tl.load(bias_out + expert * CHANNELS + channel, mask=there, other=0).to(tl.float32)[None, :]

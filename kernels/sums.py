"""The second stage of all parameters' gradients: sums over parts of the images are added up, in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv
from .launch import Launch
from .rounding import round_to

COLUMNS, PARTS = 64, 32  # of a program, and at a time


def new_partial(parts: int, gradients: list[Tensor]) -> Tensor:
    """Return room for `parts` times the sums of all gradients, one after another: (parts, sums)."""
    first = gradients[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return first.new_empty((parts, sum(gradient.numel() for gradient in gradients)), dtype=dtype)


def add_parts(gradients: list[Tensor], partial: Tensor) -> Launch:
    """Describe the launch that writes all gradients, each contiguous; without parts they are zero."""
    parts, sums = partial.shape
    ends, end = [], 0
    for gradient in gradients:
        end += gradient.numel()
        ends.append(end)
    arguments = dict(gradients=tuple(gradients), partial=partial, parts=parts, sums=sums)
    tile = dict(ENDS=tuple(ends), COLUMNS=COLUMNS, PARTS=PARTS)
    return Launch(add_up, cdiv(sums, COLUMNS), arguments | tile)


@triton.jit(do_not_specialize=["parts"])
def add_up(
    gradients, partial, parts, sums,
    ENDS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """gradients = sums over the rows of partial, cut at ENDS."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), partial.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        exists = (part < parts) & (column < sums)[None, :]
        total += tl.load(partial + part.to(tl.int64) * sums + column[None, :], mask=exists, other=0)
    total = tl.sum(total, axis=0)
    start = 0
    for i in tl.static_range(len(ENDS)):
        gradient = round_to(total, gradients[i].dtype.element_ty)
        tl.store(gradients[i] + (column - start), gradient, mask=(column >= start) & (column < ENDS[i]))
        start = ENDS[i]

"""The second stage of all parameters' gradients: sums over parts of the images are added up, in a fixed order.

A launch adds up one or, of many operators (`launch.joining`), several partial sums. Each has programs of its own.
"""

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv
from .launch import Launch, joined
from .rounding import round_to

COLUMNS, PARTS = 64, 32  # of a program, and at a time
MOST = 16  # partial sums of a launch: each is a branch of the kernel


def new_partial(parts: int, gradients: list[Tensor]) -> Tensor:
    """Return room for `parts` times the sums of all gradients, one after another: (parts, sums)."""
    first = gradients[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return first.new_empty((parts, sum(gradient.numel() for gradient in gradients)), dtype=dtype)


def add_parts(gradients: list[Tensor], partial: Tensor) -> Launch:
    """Describe the launch that writes all gradients, each contiguous; without parts they are zero."""
    return added_up([(tuple(gradients), partial)])


@joined(stage=2)
def join(launches: list[Launch]) -> list[Launch]:
    arguments = [launch.arguments for launch in launches]
    jobs = [job for of in arguments for job in zip(of["gradients"], of["partials"], strict=True)]
    return [added_up(jobs[first : first + MOST]) for first in range(0, len(jobs), MOST)]


def added_up(jobs: list[tuple[tuple[Tensor, ...], Tensor]]) -> Launch:
    gradients, partials = zip(*jobs, strict=True)
    ends = tuple(tuple(accumulate(gradient.numel() for gradient in of)) for of in gradients)
    first_programs = tuple(accumulate((cdiv(of[-1], COLUMNS) for of in ends), initial=0))
    # Multiples of 16 are one case to Triton, whatever the sizes of images.
    parts = tuple(16 * len(partial) for partial in partials)
    arguments: dict[str, Any] = dict(gradients=gradients, partials=partials, sixteen_parts=parts)
    constants = dict(ENDS=ends, PROGRAMS=first_programs, COLUMNS=COLUMNS, PARTS=PARTS)
    return Launch(add_up, first_programs[-1], arguments | constants, join=join)


@triton.jit
def add_up(
    gradients, partials, sixteen_parts,
    ENDS: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """gradients[job] = sums over the rows of partials[job], cut at ENDS[job]."""
    program = tl.program_id(0)
    for job in tl.static_range(len(partials)):
        if (program >= PROGRAMS[job]) & (program < PROGRAMS[job + 1]):
            column = (program - PROGRAMS[job]) * COLUMNS + tl.arange(0, COLUMNS)
            add_rows(gradients[job], partials[job], sixteen_parts[job] // 16, column, ENDS, job, COLUMNS, PARTS)


@triton.jit
def add_rows(
    gradients, partial, parts, column,
    ENDS: tl.constexpr, job: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = ENDS[job][len(gradients) - 1]
    total = tl.zeros((PARTS, COLUMNS), partial.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        exists = (part < parts) & (column < SUMS)[None, :]
        total += tl.load(partial + part.to(tl.int64) * SUMS + column[None, :], mask=exists, other=0)
    total = tl.sum(total, axis=0)
    start = 0
    for i in tl.static_range(len(gradients)):
        gradient = round_to(total, gradients[i].dtype.element_ty)
        tl.store(gradients[i] + (column - start), gradient, mask=(column >= start) & (column < ENDS[job][i]))
        start = ENDS[job][i]

"""Triton kernels of `striped_conv_router`: those of `striped_conv`, and the pool of `router`.

Formula and shapes in `seemore_fast.reference.striped_conv_router`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import striped_conv
from . import striped_conv_planes as planes
from .launch import Launch, named, run
from .router import new_sums, pool


def striped_conv_router(y: Tensor, *inputs: Tensor | bool) -> Tensor:
    """Write y (B, C, H, W); return sums over parts of it, (parts, B, C), for `router_from_sums`."""
    sums = sums_of(y, *inputs)
    run(forward(sums, y, *inputs), y.device)
    return sums


def specializations(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield all launches, by name, for images like x; it may be on the meta device."""
    weight_row, bias = x.new_empty(x.shape[1], 1, 1, 3), x.new_empty(x.shape[1])
    inputs = torch.empty_like(x), x, weight_row, bias, weight_row.transpose(2, 3), bias, True
    yield from named("forward", forward(sums_of(*inputs), *inputs))


def sums_of(y: Tensor, x: Tensor, weight_row: Tensor, *_: Tensor | bool) -> Tensor:
    """Return room for the sums, (parts, B, C): of whole planes where these are small."""
    if planes.fits(weight_row, x, y):
        return y.new_empty((1, *y.shape[:2]), dtype=torch.float32)
    return new_sums(y)


def forward(sums, y, x, weight_row, bias_row, weight_col, bias_col, gelu) -> Iterator[Launch]:
    parameters = weight_row, bias_row, weight_col, bias_col
    if planes.fits(weight_row, x, y):
        yield from planes.forward(y, x, *parameters, gelu, None, sums)
    else:
        yield from striped_conv.forward(y, x, *parameters, gelu, None)
        yield from pool(sums, y)

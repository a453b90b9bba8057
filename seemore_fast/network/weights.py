"""Weights of a step in flat buffers, as kernels read them, and gradients on their way back.

Few operators of torch gather all parameters into a buffer of the body's dtype and a wide one: cast, in the kernels'
layout, experts packed and channels shuffled. As many bring the gradients, written to a buffer, into the parameters'
order.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..backends.planes import padded
from ..ops.allocation import laid_out
from . import fused as f

GAP = -1  # number of elements between tensors, which are no parameter's


class Layout:
    """Layout of a flat buffer, whose elements are parameters', by number; each tensor begins at a whole vector."""

    def __init__(self, dtype: torch.dtype | None = None):
        self._numbers: list[Tensor] = []
        self.size = 0

    def add(self, numbers: Tensor) -> "View":
        """Add a tensor, laid out in memory as its elements' numbers are."""
        view = View(self, self.size, numbers.shape, numbers.stride())
        room = torch.full((padded(numbers.numel()),), GAP)
        room[: numbers.numel()] = numbers.as_strided((numbers.numel(),), (1,))
        self._numbers.append(room)
        self.size += len(room)
        return view

    def numbers(self) -> Tensor:
        return torch.cat(self._numbers)


class View(NamedTuple):
    """Tensor in a flat buffer."""

    layout: Layout
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]

    def of(self, buffers: dict[Layout, Tensor]) -> Tensor:
        return buffers[self.layout].as_strided(self.shape, self.strides, self.offset)


class Network(NamedTuple):
    """Parameters of a network as operators take them, or their gradients, or views of either."""

    first: list[Any]  # of conv_1
    blocks: list[Any]  # RMEParams and SMEParams in turn
    features: list[Any]  # of the last norm and conv_2
    last: list[Any]  # of the upsampler
    turned: list[Any]  # columns of turned 3x3 weights for backward: of each block, None for SME, then of conv_2


class Weights:
    """Places of all parameters in the buffers, made of a network whose parameters are their elements' numbers."""

    def __init__(self, numbered: Any, device: torch.device):
        self._narrow, self._wide, self._gradient = Layout(), Layout(), Layout()
        turned_columns = importlib.import_module("seemore_fast.kernels.norm_conv3x3").turned_columns
        narrow, wide, gradient = self._narrow.add, self._wide.add, lambda t: self._gradient.add(t.contiguous())
        ends = numbered._ends_now()
        first, features, last = ([t.long() for t in end] for end in (ends.first, ends.features, ends.last))
        blocks = [f.map_params(lambda _, t: t.long(), block._params()) for block in numbered.blocks()]
        dense = [block[0].weight if isinstance(block, f.RMEParams) else None for block in blocks] + [features[2]]
        self._views = Network(
            first=[wide(laid_out(first[0])), wide(first[1])],
            blocks=[f.map_params(self._add, block) for block in blocks],
            features=[*map(wide, features[:2]), narrow(laid_out(features[2])), narrow(features[3])],
            last=[wide(laid_out(last[0])), wide(last[1])],
            turned=[None if weight is None else narrow(turned_columns(weight)) for weight in dense],
        )
        self._gradients = Network(
            first=[*map(gradient, first)],
            blocks=[f.map_params(lambda _, t: gradient(t), block) for block in blocks],
            features=[*map(gradient, features)],
            last=[*map(gradient, last)],
            turned=[],
        )
        self._of_narrow, self._of_wide = (
            layout.numbers().clamp_min(0).to(device) for layout in (self._narrow, self._wide)
        )
        numbers = self._gradient.numbers()
        self.count = int(numbers.max()) + 1  # of all parameters' elements
        self._of_gradient = torch.empty(self.count, dtype=torch.int64)
        self._of_gradient[numbers[numbers != GAP]] = torch.arange(len(numbers))[numbers != GAP]
        self._of_gradient = self._of_gradient.to(device)
        self._parameters = [torch.empty_like(p, device="meta") for p in numbered.ordered_parameters()]

    def _add(self, name: str, numbers: Tensor) -> View:
        if name in f.WIDE:
            return self._wide.add(numbers)
        is_layer = name in ("weight", "weight_gate") and numbers.shape[2:] == (3, 3)
        return self._narrow.add(laid_out(numbers) if is_layer else numbers.contiguous())

    def gather(self, flat: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the buffers of the weights, in float32 at least and in dtype `narrow`, of parameters in a row."""
        wide = torch.promote_types(flat.dtype, torch.float32)
        return flat.index_select(0, self._of_wide).to(wide), flat.index_select(0, self._of_narrow).to(narrow)

    def new_buffers(self, flat: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the same without values."""
        wide = torch.promote_types(flat.dtype, torch.float32)
        return flat.new_empty(self._wide.size, dtype=wide), flat.new_empty(self._narrow.size, dtype=narrow)

    def weights(self, narrow: Tensor, wide: Tensor) -> Network:
        """Return the weights in their buffers."""
        return viewed(self._views, {self._narrow: narrow, self._wide: wide})

    def new_gradient(self, wide: Tensor) -> tuple[Tensor, Network]:
        """Return a buffer for the gradients, and these in it."""
        buffer = wide.new_empty(self._gradient.size)
        return buffer, viewed(self._gradients, {self._gradient: buffer})

    @staticmethod
    def flatten(parameters: Sequence[Tensor]) -> Tensor:
        """Return all parameters in a row."""
        return _flatten_dense_tensors(parameters)

    def in_order(self, gradient: Tensor) -> Tensor:
        """Return the elements of the buffer of gradients, parameter by parameter."""
        return gradient.index_select(0, self._of_gradient)

    def scatter(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of each parameter in `flat`, which `in_order` returned."""
        return _unflatten_dense_tensors(flat, self._parameters)


def viewed(views: Network, buffers: dict[Layout, Tensor]) -> Network:
    first, blocks, features, last, turned = views
    return Network(
        [view.of(buffers) for view in first],
        [f.map_params(lambda _, view: view.of(buffers), block) for block in blocks],
        [view.of(buffers) for view in features],
        [view.of(buffers) for view in last],
        [None if view is None else view.of(buffers) for view in turned],
    )

"""Modules of the network, with the published tree and state-dict keys, in plain PyTorch.

They run where the fused blocks cannot: with hooks, parametrizations or replaced submodules inside. Every submodule is
called as a module; experts and the layers of the router only where they were modified. The simple ones are those of the
reference.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from .. import reference
from ..reference.model import Expert
from ..reference.router import choose_experts
from .structure import HOOKS

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleList(nn.Module, Generic[M]):
        """`nn.ModuleList` of modules of one type, which type checkers then know."""

        def __init__(self, modules: Iterable[M]): ...
        def __iter__(self) -> Iterator[M]: ...
        def __len__(self) -> int: ...
        def __getitem__(self, index: int) -> M: ...

else:
    ModuleList = nn.ModuleList


def has_additions(module: nn.Module) -> bool:
    """Return whether `module` has a hook or a `forward` of its own."""
    attributes = vars(module)
    return "forward" in attributes or any(attributes[name] for name in HOOKS)


def is_customised(module: nn.Module) -> bool:
    """Return whether `module` or a module inside it has a hook or a `forward` of its own."""
    return any(map(has_additions, module.modules()))


def shuffle_channels(x: Tensor, dim: int = 1) -> Tensor:
    """Interleave the two halves of dimension `dim`: channel g * C + c becomes c * 2 + g."""
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


class Router(reference.model.Router):
    """Choice of experts per image, by layers of its body that were modified, too."""

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        as_built = [type(layer) for layer in self.body] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
        linear = self.body[2] if as_built else None
        if isinstance(linear, nn.Linear) and linear.bias is None and not is_customised(self.body):
            return reference.router(a, linear.weight, self.top_k)
        return choose_experts(self.body(a), self.top_k)


class MoELayer(reference.model.MoELayer):
    """Mixture of low-rank experts, of which only those that the router chose for an image are computed."""

    router = Router
    experts: "ModuleList[Expert]"
    gate: Router

    def packed_experts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the experts' parameters in the order and layout of `low_rank_experts`."""
        first, second, third = ([getattr(e, name) for e in self.experts] for name in ("conv_1", "conv_2", "conv_3"))
        return (
            torch.cat([conv.weight.flatten(1) for conv in first]),
            torch.cat([conv.bias for conv in first]),
            torch.cat([conv.weight.flatten(1) for conv in second]),
            torch.cat([conv.bias for conv in second]),
            torch.cat([conv.weight.flatten(1) for conv in third], dim=1),
            torch.stack([conv.bias for conv in third]),
        )

    def modulate(self, a: Tensor, k: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        as_built = all(type(e) is Expert and {type(conv) for conv in e.children()} == {nn.Conv2d} for e in self.experts)
        if as_built and not is_customised(self.experts):
            return reference.low_rank_experts(a, k, index, probability, *self.packed_experts(), self.ranks)
        return super().modulate(a, k, index, probability)  # dense: whatever was added to an expert runs


class MoEBlock(reference.model.MoEBlock):
    """MoRE with what prepares its two inputs and projects its output."""

    mixture = MoELayer
    moe_layer: MoELayer

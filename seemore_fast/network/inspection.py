"""Forward hooks on parts of a network, and the choices of its routers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .model import SeemoRe
from .modules import MoELayer


@contextmanager
def forward_hooks(modules: Sequence[nn.Module], callback: Callable) -> Iterator[None]:
    """Call `callback(module, inputs, output)` after each of the modules, which a fused network then runs unfused."""
    handles = [module.register_forward_hook(callback) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moe_layers(model: SeemoRe) -> list[MoELayer]:
    """Return the mixture of experts of each group."""
    return [group.local_block.block.moe_layer for group in model.body]


@torch.no_grad()
def expert_usage(model: SeemoRe, x: Tensor) -> Tensor:
    """Return how often each group chooses each expert for the images x, int64 (groups, experts)."""
    chosen, layers = [], moe_layers(model)

    def count(gate: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]):
        chosen.append(torch.bincount(outputs[0].flatten(), minlength=len(layers[0].ranks)))

    with forward_hooks([layer.gate for layer in layers], count):
        model(x)
    return torch.stack(chosen)

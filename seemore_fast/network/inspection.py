"""Forward hooks on parts of a network, and the choices of its routers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def forward_hooks(modules: list[nn.Module], callback: Callable) -> Iterator[None]:
    """Call `callback(module, inputs, output)` after each of the modules, which a fused network then runs unfused."""
    handles = [module.register_forward_hook(callback) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expert_usage(model: nn.Module, x: Tensor) -> Tensor:
    """Return how often each group chooses each expert for the images x, int64 (groups, experts)."""
    chosen = []

    def count(gate: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]):
        chosen.append(torch.bincount(outputs[0].flatten(), minlength=gate.body[2].out_features))

    with forward_hooks([group.local_block.block.moe_layer.gate for group in model.body], count):
        model(x)
    return torch.stack(chosen)

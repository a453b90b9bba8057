"""Feature maps before and after the experts MoRE and SEE, as in the paper's Figure 5."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..network.inspection import forward_hooks


class Maps(NamedTuple):
    """Mean magnitude of features over channels, float32 (H, W) for each group."""

    before: list[Tensor]
    after: list[Tensor]


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor) -> dict[str, Maps]:
    """Return the maps before and after "MoRE" and "SEE" of an image x (1, C, H, W), group by group."""
    blocks = {
        "MoRE": [group.local_block.block.moe_layer for group in model.body],
        "SEE": [group.global_block.block for group in model.body],
    }
    maps = {name: Maps([], []) for name in blocks}
    names = {module: name for name, modules in blocks.items() for module in modules}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor):
        for recorded, feature in zip(maps[names[module]], (inputs[0], output), strict=True):
            recorded.append(feature[0].float().abs().mean(dim=0))

    with forward_hooks(list(names), record):
        model(x)
    return maps

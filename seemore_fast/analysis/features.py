"""Feature maps before and after the experts MoRE and SEE, as in the paper's Figure 5."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..network.inspection import forward_hooks, moe_layers
from ..network.model import SeemoRe


class Maps(NamedTuple):
    """Mean magnitude of features over channels, float32 (H, W) for each group."""

    before: list[Tensor]
    after: list[Tensor]


@torch.no_grad()
def feature_maps(model: SeemoRe, x: Tensor) -> dict[str, Maps]:
    """Return the maps before and after "MoRE" and "SEE" of an image x (1, C, H, W), group by group."""
    groups: Any = model.body
    blocks: dict[str, list[nn.Module]] = {
        "MoRE": [*moe_layers(model)],
        "SEE": [group.global_block.block for group in groups],
    }
    maps = {name: Maps([], []) for name in blocks}
    names = {module: name for name, modules in blocks.items() for module in modules}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor):
        for recorded, feature in zip(maps[names[module]], (inputs[0], output), strict=True):
            recorded.append(feature[0].float().abs().mean(dim=0))

    with forward_hooks(list(names), record):
        model(x)
    return maps

"""Parameters and multiply-adds of each operator, which add up to the published totals."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..network.inspection import forward_hooks
from ..network.model import SeemoRe

# Operators of the package, and the modules that each computes.
OPERATORS = {
    "norm_conv3x3, first and last": r"conv_1|norm|conv_2",
    "norm_conv3x3 (RME)": r"body\.\d+\.local_block\.(norm_1|block\.conv_1\.\d)",
    "striped_conv_router": r"body\.\d+\.local_block\.block\.(conv_2\.0\.conv\.\d|moe_layer\.gate\.body\.2)",
    "calibrate": r"body\.\d+\.local_block\.block\.(agg_conv\.0|conv\.\d)",
    "low_rank_experts": r"body\.\d+\.local_block\.block\.(moe_layer\.experts\.\d+\.conv_\d|proj)",
    "gated_ffn": r"body\.\d+\.(local|global)_block\.(norm_2|ffn\..*)",
    "norm_pointwise (SEE)": r"body\.\d+\.global_block\.(norm_1|block\.to_qv\.0)",
    "striped_conv (SEE)": r"body\.\d+\.global_block\.block\.(attn\.conv\.\d|proj)",
    "conv3x3_shuffle": r"upsampler\.0",
}
# Parameters, and 1e9 multiply-adds for 1280x720 pixels of output: the paper's Table 1 and its supplement.
PUBLISHED = {
    ("t", 2): (220_104, 45.0), ("t", 3): (224_979, 20.5), ("t", 4): (231_804, 11.9),
    ("b", 2): (490_364, 101.8), ("b", 3): (496_859, 45.8), ("b", 4): (505_952, 26.3),
    ("l", 2): (953_308, 197.8), ("l", 3): (959_803, 88.4), ("l", 4): (968_896, 50.4),
}  # fmt: skip


class Cost(NamedTuple):
    """Parameters, and multiply-adds for one image."""

    parameters: int
    macs: int


def operations(config: dict, height: int, width: int) -> dict[str, Cost]:
    """Return the cost of each operator of a network for an input of height x width pixels.

    Counted are the multiply-adds of convolutions and of the router's matrix, as is customary, and of the `topk` largest
    experts, the most that work on one image. LayerNorm, GELU, interpolation and sums are not counted.
    """
    with torch.device("meta"):
        model = SeemoRe(**config).eval()
        x = torch.empty(1, config["in_chans"], height, width)
    macs = dict.fromkeys(model.state_dict(), 0)
    names = {module: name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}

    def count(module: nn.Conv2d | nn.Linear, inputs: tuple, output: Tensor):
        macs[f"{names[module]}.weight"] += output.numel() * module.weight[0].numel()

    with torch.no_grad(), forward_hooks(list(names), count):
        model(x)
    for i in range(config["num_layers"]):
        experts = {}
        for key in (key for key in macs if key.startswith(f"body.{i}.local_block.block.moe_layer.experts.")):
            experts.setdefault(key.split(".")[6], []).append(key)
        by_cost = sorted(experts.values(), key=lambda keys: sum(macs[key] for key in keys))
        for key in (key for keys in by_cost[: -config["topk"]] for key in keys):
            macs[key] = 0
    table = dict.fromkeys(OPERATORS, Cost(0, 0))
    for key, parameter in model.state_dict().items():
        module = key.rpartition(".")[0]
        (operator,) = (name for name, pattern in OPERATORS.items() if re.fullmatch(pattern, module))
        table[operator] = Cost(table[operator].parameters + parameter.numel(), table[operator].macs + macs[key])
    return table


def total(table: dict[str, Cost]) -> Cost:
    return Cost(*map(sum, zip(*table.values(), strict=True)))

"""GatedFFN, the feed-forward half of both experts, with its LayerNorm and residual.

In the paper: "GatedFFN".
"""

import torch.nn.functional as F
from torch import Tensor

from .norm_pointwise import norm_pointwise


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Split the widened image in two, gate one half by the other's surroundings, add the result to x.

        u, g = chunk(GELU(weight_1 @ LN(x) + bias_1), 2)
        y    = x + GELU(weight_2 @ (u * (depthwise_3x3(g) + bias_gate)) + bias_2)

    | tensor                 | shape         |
    |------------------------|---------------|
    | x, returns             | (B, C, H, W)  |
    | norm_weight, norm_bias | (C,)          |
    | weight_1               | (2C, C, 1, 1) |
    | bias_1                 | (2C,)         |
    | weight_gate            | (C, 1, 3, 3)  |
    | weight_2               | (C, C, 1, 1)  |
    | bias_gate, bias_2      | (C,)          |
    """
    u, g = norm_pointwise(x, norm_weight, norm_bias, weight_1, bias_1, activation="gelu", eps=eps).chunk(2, dim=1)
    gated = u * F.conv2d(g, weight_gate, bias_gate, padding=1, groups=g.shape[1])
    return x + F.gelu(F.conv2d(gated, weight_2, bias_2))

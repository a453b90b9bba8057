"""LayerNorm followed by a 1x1 convolution: how SEE and GatedFFN begin.

In the paper: "Spatial Modulating Expert".
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate
from .layer_norm import layer_norm


def norm_pointwise(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Mix the normalised channels of each pixel.

        y = activation(weight @ LN(x) + bias)

    | tensor                 | shape        |
    |------------------------|--------------|
    | x                      | (B, C, H, W) |
    | norm_weight, norm_bias | (C,)         |
    | weight                 | (D, C, 1, 1) |
    | bias                   | (D,)         |
    | returns                | (B, D, H, W) |
    """
    return activate(F.conv2d(layer_norm(x, norm_weight, norm_bias, eps), weight, bias), activation)

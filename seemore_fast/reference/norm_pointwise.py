"""LayerNorm followed by a 1x1 convolution: how SEE and GatedFFN begin.

In the paper: "Spatial Modulating Expert".
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate
from .layer_norm import layer_norm


def norm_pointwise(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """Mix the normalised channels of each pixel and add the result to `residual`.

        y = residual + activation(weight @ LN(x) + bias)

    | tensor                 | shape        |                        |
    |------------------------|--------------|------------------------|
    | x                      | (B, C, H, W) |                        |
    | norm_weight, norm_bias | (C,)         | None: no LayerNorm     |
    | weight                 | (D, C, 1, 1) |                        |
    | bias                   | (D,)         |                        |
    | residual               | (B, D, H, W) | None: nothing is added |
    | returns                | (B, D, H, W) |                        |
    """
    if norm_weight is not None:
        assert norm_bias is not None  # given together
        x = layer_norm(x, norm_weight, norm_bias, eps)
    y = activate(F.conv2d(x, weight, bias), activation)
    return y if residual is None else residual + y

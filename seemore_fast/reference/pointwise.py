"""A 1x1 convolution whose result is added to an image: how SEE ends.

In the paper: "Spatial Modulating Expert".
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """Mix the channels of each pixel and add the result to `residual`.

        y = residual + activation(weight @ x + bias)

    | tensor            | shape        |                        |
    |-------------------|--------------|------------------------|
    | x                 | (B, C, H, W) |                        |
    | weight            | (D, C, 1, 1) |                        |
    | bias              | (D,)         |                        |
    | residual          | (B, D, H, W) | None: nothing is added |
    | returns           | (B, D, H, W) |                        |
    """
    y = activate(F.conv2d(x, weight, bias), activation)
    return y if residual is None else residual + y

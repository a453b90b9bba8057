"""A 1x1 convolution whose result is added to an image: how SEE ends.

In the paper: "Spatial Modulating Expert".
"""

from torch import Tensor

from .norm_pointwise import norm_pointwise


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """Mix the channels of each pixel and add the result to `residual`: `norm_pointwise` without its norm.

    y = residual + activation(weight @ x + bias)
    """
    return norm_pointwise(x, None, None, weight, bias, activation=activation, residual=residual)

"""LayerNorm, dense 3x3 convolution, GELU, 1x1 convolution: how MoRE begins.

In the paper: "Rank Modulating Expert".
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate
from .layer_norm import layer_norm


def norm_conv3x3(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    weight_pw: Tensor | None = None,
    bias_pw: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Convolve the normalised image with a dense 3x3 kernel and, if weights are given, mix the result's channels.

        y = weight_pw @ activation(conv_3x3(LN(x)) + bias) + bias_pw

    | tensor                 | shape        |                              |
    |------------------------|--------------|------------------------------|
    | x                      | (B, C, H, W) |                              |
    | norm_weight, norm_bias | (C,)         | None: no LayerNorm           |
    | weight                 | (D, C, 3, 3) |                              |
    | bias                   | (D,)         |                              |
    | weight_pw              | (P, D, 1, 1) | None: no pointwise step      |
    | bias_pw                | (P,)         |                              |
    | returns                | (B, P or D, H, W) |                         |

    The convolution pads with one zero on every side, after LayerNorm: the border sees 0, not LN's bias.
    """
    if norm_weight is not None:
        assert norm_bias is not None  # given together
        x = layer_norm(x, norm_weight, norm_bias, eps)
    y = activate(F.conv2d(x, weight, bias, padding=1), activation)
    return y if weight_pw is None else F.conv2d(y, weight_pw, bias_pw)

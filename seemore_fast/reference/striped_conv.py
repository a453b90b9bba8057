"""Striped convolution: the large receptive field of SEE at the price of two lines.

In the paper: "Spatial Modulating Expert".
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate


def striped_conv(
    x: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Depthwise 1xK along the width, then depthwise Kx1 along the height, nothing between them.

        y = gate * activation(depthwise_Kx1(depthwise_1xK(x) + bias_row) + bias_col)

    | tensor             | shape        |
    |--------------------|--------------|
    | x, gate, returns   | (B, C, H, W) |
    | weight_row         | (C, 1, 1, K) |
    | weight_col         | (C, 1, K, 1) |
    | bias_row, bias_col | (C,)         |

    K is odd; both steps pad with K // 2 zeros. So above and below the image the second one reads zeros, not
    ``bias_row``.
    """
    channels, taps = x.shape[1], weight_row.shape[-1]
    y = F.conv2d(x, weight_row, bias_row, padding=(0, taps // 2), groups=channels)
    y = F.conv2d(y, weight_col, bias_col, padding=(taps // 2, 0), groups=channels)
    y = activate(y, activation)
    return y if gate is None else y * gate

"""The spatial gate of GatedFFN.

In the paper: "GatedFFN".
"""

import torch.nn.functional as F
from torch import Tensor


def depthwise_gate(u: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply u by what a depthwise 3x3 convolution sees around each pixel of g.

        y = u * (depthwise_3x3(g) + bias)

    | tensor        | shape        |
    |---------------|--------------|
    | u, g, returns | (B, C, H, W) |
    | weight        | (C, 1, 3, 3) |
    | bias          | (C,)         |

    The convolution pads with one zero on every side.
    """
    return u * F.conv2d(g, weight, bias, padding=1, groups=g.shape[1])

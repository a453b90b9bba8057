"""Contextual calibration of the experts' key: the aggregation branch of MoRE.

In the paper: "Rank Modulating Expert".
"""

import torch.nn.functional as F
from torch import Tensor


def calibrate(
    k: Tensor,
    weight_agg: Tensor,
    bias_agg: Tensor,
    weight_dw: Tensor,
    bias_dw: Tensor,
    weight_pw: Tensor,
    bias_pw: Tensor,
    recursive: int,
) -> Tensor:
    """Add to k a smooth map of its surroundings, gathered at 1 / 4^recursive of its size.

        s = k;  `recursive` times: s = GELU(depthwise_4x4_stride_4(s))       the same weights every time
        y = k + bilinear(weight_pw @ depthwise_3x3(s) + bias_pw, to H x W)   align_corners=False

    | tensor                     | shape        |
    |----------------------------|--------------|
    | k, returns                 | (B, C, H, W) |
    | weight_agg                 | (C, 1, 4, 4) |
    | weight_dw                  | (C, 1, 3, 3) |
    | weight_pw                  | (C, C, 1, 1) |
    | bias_agg, bias_dw, bias_pw | (C,)         |

    Each aggregation drops up to three last rows and columns and needs at least 4x4 pixels, so H and W are at
    least 4^recursive. Where they are no multiple of it, the small map is stretched over the whole image, as in
    the published code.
    """
    s = mix(aggregate(k, weight_agg, bias_agg, recursive), weight_dw, bias_dw, weight_pw, bias_pw)
    return k + F.interpolate(s, size=k.shape[-2:], mode="bilinear", align_corners=False)


def aggregate(k: Tensor, weight_agg: Tensor, bias_agg: Tensor, recursive: int) -> Tensor:
    """Return the first s of `calibrate`, (B, C, H / 4^recursive, W / 4^recursive)."""
    for _ in range(recursive):
        k = F.gelu(F.conv2d(k, weight_agg, bias_agg, stride=4, groups=k.shape[1]))
    return k


def mix(s: Tensor, weight_dw: Tensor, bias_dw: Tensor, weight_pw: Tensor, bias_pw: Tensor) -> Tensor:
    """Return the small map that `calibrate` enlarges, from what was aggregated; of the same shape."""
    return F.conv2d(F.conv2d(s, weight_dw, bias_dw, padding=1, groups=s.shape[1]), weight_pw, bias_pw)

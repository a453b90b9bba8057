"""LayerNorm over the channels of each pixel.

In the paper: "LN".
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every pixel over its channels, then scale and shift each channel.

        y = (x - mean_C(x)) / sqrt(var_C(x) + eps) * weight + bias

    | tensor       | shape        | dtype                |
    |--------------|--------------|----------------------|
    | x            | (B, C, H, W) | any floating type    |
    | weight, bias | (C,)         | that of x            |
    | returns      | (B, C, H, W) | that of x            |

    The variance is the biased one. Statistics are at least float32: squares of float16 overflow at 256.
    """
    dtype = x.dtype
    # Weights too: their gradients are sums over all pixels, which torch would add up in the type it is given.
    x, weight, bias = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (x, weight, bias))
    if x.is_contiguous(memory_format=torch.channels_last):  # channels are innermost: torch's own kernel, no copy
        y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
    else:
        centred = x - x.mean(dim=1, keepdim=True)
        normalised = centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
        y = normalised * weight[:, None, None] + bias[:, None, None]
    return y.to(dtype)

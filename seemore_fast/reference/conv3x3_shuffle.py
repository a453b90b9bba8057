"""Dense 3x3 convolution, pixel shuffle, range and mean: the upsampler, how the network ends.

In the paper: "Upsampler".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .router import without_autocast


def conv3x3_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, *, scale: int, img_range: float = 1.0
) -> Tensor:
    """Convolve x with a dense 3x3 kernel and spread the channels of each pixel over scale x scale pixels.

        y = pixel_shuffle(conv_3x3(x) + bias, scale) / img_range + mean

    | tensor  | shape                             |                                             |
    |---------|-----------------------------------|---------------------------------------------|
    | x       | (B, C, H, W)                      |                                             |
    | weight  | (I * scale^2, C, 3, 3)            | I: channels of the picture                  |
    | bias    | (I * scale^2,)                    |                                             |
    | mean    | (1, I, 1, 1)                      |                                             |
    | returns | (B, I, scale * H, scale * W)      | at least float32, as is all that it computes |

    Dtypes may differ; autocast changes nothing. Rounding to the 8 bits of bfloat16 would show in the picture.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias, mean = (tensor.to(wide) for tensor in (x, weight, bias, mean))
    with without_autocast(x.device.type):
        return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), scale) / img_range + mean

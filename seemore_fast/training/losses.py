"""Training losses."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fft_loss(x: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of the real and imaginary parts of rfft2, at least in float32.

    | tensor    | shape        | dtype               |
    |-----------|--------------|---------------------|
    | x, target | (B, C, H, W) | any floating        |
    | returns   | ()           | float32, or float64 |

    The transform is not divided by the number of pixels, as in the published training (with weight 0.1).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # By linearity one transform, of the difference, is enough.
    return torch.view_as_real(torch.fft.rfft2(x.to(wide) - target.to(wide))).abs().mean()


def pixel_loss(x: Tensor, target: Tensor, l1: float, mse: float, fft: float) -> Tensor:
    """Return the sum of the mean absolute difference, the mean squared one and `fft_loss` with these weights."""
    terms = []
    if l1:
        terms.append(l1 * F.l1_loss(x, target))
    if mse:
        terms.append(mse * F.mse_loss(x, target))
    if fft:
        terms.append(fft * fft_loss(x, target))
    return sum(terms[1:], start=terms[0])

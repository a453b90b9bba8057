"""What training makes small."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fft_loss(x: Tensor, truth: Tensor) -> Tensor:
    """Return the mean absolute difference of the real and imaginary parts of rfft2, at least in float32.

    | tensor   | shape        | dtype        |
    |----------|--------------|--------------|
    | x, truth | (B, C, H, W) | any floating |
    | returns  | ()           | float32, or float64 |

    The transform is not divided by the number of pixels, as in the published training (its weight there is 0.1).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # By linearity the transform of the difference: half of the work.
    return torch.view_as_real(torch.fft.rfft2(x.to(wide) - truth.to(wide))).abs().mean()


def pixel_loss(x: Tensor, truth: Tensor, l1: float, mse: float, fft: float) -> Tensor:
    """Sum `l1` times the mean absolute difference, `mse` times the squared, `fft` times that of the spectra."""
    terms = []
    if l1:
        terms.append(l1 * F.l1_loss(x, truth))
    if mse:
        terms.append(mse * F.mse_loss(x, truth))
    if fft:
        terms.append(fft * fft_loss(x, truth))
    return sum(terms)

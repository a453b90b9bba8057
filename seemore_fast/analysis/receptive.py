"""Effective receptive field by gradient (Luo et al., NeurIPS 2016)."""

import torch
from torch import Tensor, nn


def receptive_field(model: nn.Module, x: Tensor) -> Tensor:
    """Return the influence of each input pixel on the middle of the output, float32 (H, W) with sum one.

    x is (B, C, H, W); the field is the magnitude of the gradient of the middle output pixel's mean over channels,
    summed over the input's channels, mean over the images. Parameters get no gradients.
    """
    x = x.detach().requires_grad_()
    y = model(x)
    rows, columns = (slice(n // 2 - 1, n // 2 + 1) if n % 2 == 0 else slice(n // 2, n // 2 + 1) for n in y.shape[2:])
    (gradient,) = torch.autograd.grad(y[:, :, rows, columns].mean(dim=(1, 2, 3)).sum(), x)
    field = gradient.float().abs().sum(dim=1)
    return (field / field.sum(dim=(1, 2), keepdim=True)).mean(dim=0)


def side_of(field: Tensor, share: float) -> int:
    """Return the side, in pixels, of the smallest square around the middle that holds this share of the field."""
    height, width = field.shape
    rows = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    columns = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None, :]).round(decimals=1).flatten()
    order = ring.argsort(stable=True)
    held = field.double().flatten()[order].cumsum(0) / field.double().sum()
    first = int(torch.searchsorted(held, share))
    return int(2 * ring[order[min(first, len(order) - 1)]].item() + 1)

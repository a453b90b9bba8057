"""What a run starts from: interpolation, or the weights of another one, also of another scale."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..network.checkpoint import load_model
from .config import ConfigError


def start(model: nn.Module, told: str | None):
    """Set the weights that training starts from: interpolation, those of a file or a shipped model, or random ones."""
    if told == "interpolation":
        start_from_interpolation(model)
    elif told is not None:
        start_from(model, told)


@torch.no_grad()
def start_from_interpolation(model: nn.Module):
    """Set the first and the last layer so that the untrained network interpolates bilinearly.

    The first channels of conv_1 pass the image through, conv_2 (which closes the body) starts at zero, and the
    upsampler reads bilinear weights off the passed channels. Saves the first thousand steps.
    """
    scale, channels = model.scale, model.in_chans
    for parameter in (model.conv_2.weight, model.conv_2.bias, model.upsampler[0].bias):
        parameter.zero_()
    model.conv_1.weight[:channels] = 0
    model.conv_1.bias[:channels] = 0
    model.upsampler[0].weight *= 0.1
    impulses = torch.eye(9).view(9, 1, 3, 3)
    blown_up = F.interpolate(impulses, scale_factor=scale, mode="bilinear", align_corners=False)
    taps = blown_up[:, 0, scale : 2 * scale, scale : 2 * scale].reshape(9, scale**2).t().reshape(-1, 3, 3)
    for channel in range(channels):
        model.conv_1.weight[channel, channel, 1, 1] = 1
        rows = slice(channel * scale**2, (channel + 1) * scale**2)
        model.upsampler[0].weight[rows, :channels] = 0
        model.upsampler[0].weight[rows, channel] = taps


@torch.no_grad()
def start_from(model: nn.Module, name_or_path: str):
    """Copy trained weights, as x3 starts from x2 and x4 from x3; raise ConfigError where they do not fit.

    The upsampler of another scale is interpolated linearly between the places of its pixels inside one of low
    resolution: what comes out is nearly what it was, at another size.
    """
    try:
        source = load_model(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {error}") from None
    weights = source.state_dict()
    if source.scale != model.scale:
        for name in ("upsampler.0.weight", "upsampler.0.bias"):
            weights[name] = other_scale(weights[name], source.scale, model.scale)
    mine = model.state_dict()
    for name in sorted({*mine, *weights}):
        shapes = [tuple(of[name].shape) if name in of else None for of in (weights, mine)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"init_from: {name_or_path} has {name} of shape {shapes[0]}, this network of {shapes[1]}")
    model.load_state_dict(weights)


def other_scale(weight: Tensor, scale: int, wanted: int) -> Tensor:
    """Return the upsampler's weight or bias (C * scale^2, ...) for another scale, (C * wanted^2, ...)."""

    def places(count: int) -> np.ndarray:  # of its pixels in one of low resolution, around 0
        return (np.arange(count) + 0.5) / count - 0.5

    if scale == 1:
        blend = np.ones((wanted, 1))
    else:  # linear between neighbours, and beyond the outermost
        at = (places(wanted) - places(scale)[0]) * scale
        left = np.clip(np.floor(at).astype(int), 0, scale - 2)
        blend = np.zeros((wanted, scale))
        rows = np.arange(wanted)
        blend[rows, left], blend[rows, left + 1] = 1 - (at - left), at - left
    blend = torch.from_numpy(blend).to(weight)
    phases = weight.unflatten(0, (-1, scale, scale))
    return torch.einsum("yi,xj,cij...->cyx...", blend, blend, phases).flatten(0, 2)

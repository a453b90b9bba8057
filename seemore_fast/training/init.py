"""Initial weights of a run: bilinear interpolation, or those of another network, also of another scale."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..network.blocks import parameters_of
from ..network.checkpoint import load_model
from ..network.model import SeemoRe


def init_weights(model: SeemoRe, source: str | None):
    """Set the initial weights: "interpolation", a file or shipped model, or None for the random ones."""
    if source == "interpolation":
        init_interpolation(model)
    elif source is not None:
        init_from(model, source)


@torch.no_grad()
def init_interpolation(model: SeemoRe):
    """Set the first and the last layer so that the untrained network interpolates bilinearly.

    The first channels of conv_1 pass the image through, conv_2 (which closes the body) starts at zero, and the
    upsampler reads bilinear weights off the passed channels. Saves the first thousand steps.
    """
    scale, channels = model.scale, model.in_chans
    (first, bias), (upsampler, upsampler_bias) = parameters_of(model.conv_1), parameters_of(model.upsampler[0])
    for parameter in (*parameters_of(model.conv_2), upsampler_bias):
        parameter.zero_()
    first[:channels] = 0
    bias[:channels] = 0
    upsampler *= 0.1
    impulses = torch.eye(9).view(9, 1, 3, 3)
    enlarged = F.interpolate(impulses, scale_factor=scale, mode="bilinear", align_corners=False)
    taps = enlarged[:, 0, scale : 2 * scale, scale : 2 * scale].reshape(9, scale**2).t().reshape(-1, 3, 3)
    for channel in range(channels):
        first[channel, channel, 1, 1] = 1
        rows = slice(channel * scale**2, (channel + 1) * scale**2)
        upsampler[rows, :channels] = 0
        upsampler[rows, channel] = taps


@torch.no_grad()
def init_from(model: SeemoRe, name_or_path: str):
    """Copy trained weights, as x3 starts from x2 and x4 from x3; raise ConfigError if they do not fit.

    The upsampler of another scale is interpolated linearly between its subpixels: the output is nearly the same image
    at another size.
    """
    try:
        source = load_model(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {error}") from None
    weights = source.state_dict()
    if source.scale != model.scale:
        for name in ("upsampler.0.weight", "upsampler.0.bias"):
            weights[name] = rescale_upsampler(weights[name], source.scale, model.scale)
    expected = model.state_dict()
    for name in sorted({*expected, *weights}):
        shapes = [tuple(of[name].shape) if name in of else None for of in (weights, expected)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"init_from: {name_or_path} has {name} of shape {shapes[0]}, this network of {shapes[1]}")
    model.load_state_dict(weights)


def rescale_upsampler(weight: Tensor, scale: int, new_scale: int) -> Tensor:
    """Return the upsampler's weight or bias (C * scale^2, ...) for another scale, (C * new_scale^2, ...)."""

    def centres(count: int) -> np.ndarray:  # of the subpixels of an LR pixel, around 0
        return (np.arange(count) + 0.5) / count - 0.5

    if scale == 1:
        blend = np.ones((new_scale, 1))
    else:  # linear between neighbours, and beyond the outermost
        position = (centres(new_scale) - centres(scale)[0]) * scale
        left = np.clip(np.floor(position).astype(int), 0, scale - 2)
        blend = np.zeros((new_scale, scale))
        rows = np.arange(new_scale)
        blend[rows, left], blend[rows, left + 1] = 1 - (position - left), position - left
    blend = torch.from_numpy(blend).to(weight)
    phases = weight.unflatten(0, (-1, scale, scale))
    return torch.einsum("yi,xj,cij...->cyx...", blend, blend, phases).flatten(0, 2)

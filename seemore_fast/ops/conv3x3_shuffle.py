"""Operator `conv3x3_shuffle`: the upsampler, in at least float32, under autocast too."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import select_backend
from ..reference.router import without_autocast
from .checks import check_at_least
from .norm_conv3x3 import norm_conv3x3
from .operator import Operator, P, R, Values


def _widen(values: Values) -> Values:
    """Return the tensors in the dtype of x, or float32; anything but a floating tensor as it is, to be refused."""
    x = values["x"]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return values
    wide = torch.promote_types(x.dtype, torch.float32)
    return {k: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}


def _validate(values: Values, sizes: dict[str, int]):
    scale, img_range = values["scale"], values["img_range"]
    check_at_least("conv3x3_shuffle", "scale", scale, 1)
    if not isinstance(img_range, int | float) or not img_range > 0:
        raise ValueError(f"conv3x3_shuffle: img_range is {img_range!r}, expected a positive number")
    if sizes["D"] != sizes["I"] * scale**2:
        raise ValueError(
            f"conv3x3_shuffle: weight has shape {tuple(values['weight'].shape)}, expected {sizes['I'] * scale**2} "
            f"output channels: {scale}^2 for each of the {sizes['I']} that mean has"
        )


def _results(values: Values) -> tuple[Tensor]:
    x, scale = values["x"], values["scale"]
    size = (x.shape[0], values["mean"].shape[1], scale * x.shape[2], scale * x.shape[3])
    return (torch.empty_like(x[:, :1, :1, :1].expand(size), memory_format=torch.contiguous_format),)


class Shuffle(Operator[P, R]):
    """`conv3x3_shuffle`, which a backend without such a kernel computes by that of `norm_conv3x3`."""

    def compute(self, values: Values) -> Any:
        x, weight, bias, mean, scale, img_range = values.values()
        size = self.size(values)
        with without_autocast(x.device.type):  # for which a kernel would have to have its dtype, too
            if select_backend(self.name, x, size) != "reference":
                return self.packet(x, weight, bias, mean, scale, float(img_range))
        if select_backend("norm_conv3x3", x, size) == "reference":
            return reference.conv3x3_shuffle(**values)
        y = norm_conv3x3.packet(x, None, None, weight, bias, None, None, None, 0.0)
        return F.pixel_shuffle(y, scale) / img_range + mean


conv3x3_shuffle = Shuffle(
    reference.conv3x3_shuffle,
    {"x": "B C H W", "weight": "D C 3 3 stencil", "bias": "D", "mean": "1 I 1 1"},
    {"scale": "int", "img_range": "float"},
    results=_results,
    autocast=_widen,
    size=lambda values: max(values["weight"].shape[:2]),
    validate=_validate,
    outside={"mean": lambda dy: dy.sum(dim=(0, 2, 3), keepdim=True)},
)

"""Operator `norm_conv3x3`: how MoRE begins, and the network's dense convolutions."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import lookup_kernel
from .allocation import empty_image, stencil
from .autocast import to_autocast_dtype
from .checks import check_shapes, check_together
from .operator import Operator, Values, define

CONVOLUTIONS = {"weight": "D C 3 3 stencil", "bias": "D", "weight_pw": "P D 1 1 ?", "bias_pw": "P ?"}


def _cast(values: Values) -> Values:
    """Normalise x in its own dtype; without a norm, x is what the convolution of autocast's dtype reads."""
    return to_autocast_dtype(values, CONVOLUTIONS if values["norm_weight"] is not None else ("x", *CONVOLUTIONS))


def _validate(values: Values, sizes: dict[str, int]):
    for pair in (("norm_weight", "norm_bias"), ("weight_pw", "bias_pw")):
        check_together("norm_conv3x3", **{name: values[name] for name in pair})


def _results(values: Values) -> tuple[Tensor]:
    weight, last = values["weight"], values["weight_pw"]
    return (empty_image(values["x"], len(weight if last is None else last), weight.dtype),)


def _widest(values: Values) -> int:
    """Return the width of the operator for its kernels, which are made for C -> C -> 2C."""
    last = values["weight_pw"]
    return max(*values["weight"].shape[:2], 0 if last is None else (len(last) + 1) // 2)


norm_conv3x3 = Operator(
    reference.norm_conv3x3,
    {"x": "B C H W", "norm_weight": "C ?", "norm_bias": "C ?", **CONVOLUTIONS},
    {"activation": "str?", "eps": "float"},
    results=_results,
    autocast=_cast,
    size=_widest,
    validate=_validate,
)


def norm_conv3x3_into(y: Tensor, x: Tensor, *parameters: Tensor | None, eps: float = 1e-6, add: bool = False):
    """Write the result of `norm_conv3x3` to y, of any floating dtype, or add it; by Triton, without gradients.

    Nothing is checked: it is a part of the network.
    """
    norm_weight, norm_bias, weight, bias = parameters
    cast = to_autocast_dtype({"weight": weight, "bias": bias}, ("weight", "bias"))
    torch.ops.seemore_fast.norm_conv3x3_into(y, x, norm_weight, norm_bias, *cast.values(), eps, add)


def write_into(y: Tensor, x: Tensor, *parameters_and_options: Any):
    """Do as `norm_conv3x3_into` without the dispatcher, all arguments by position."""
    norm_weight, norm_bias, weight, bias, eps, add = parameters_and_options
    norm = (None if p is None else p.contiguous() for p in (norm_weight, norm_bias))
    kernel = lookup_kernel("norm_conv3x3", x, max(weight.shape[:2]), "_into")
    kernel(y, x, *norm, stencil(weight, x), bias.contiguous(), eps, add)


def _into_fake(y: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, *_: Any):
    check_shapes("norm_conv3x3", x=(x, "B C H W"), weight=(weight, "D C 3 3"))


define(
    "norm_conv3x3_into",
    "(Tensor(a!) y, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, float eps, bool add) "
    "-> ()",
    write_into,
    _into_fake,
)

"""Public operator `pointwise`; formula and shapes in `seemore_fast.reference.pointwise`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose
from .checks import check_choice, check_tensors
from .library import cast_for_autocast
from .norm_pointwise import widest


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """1x1 convolution, activation (None or "gelu"), sum with `residual`.

    Under autocast the convolution is of autocast's dtype, and the sum of the wider one of the two.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    check_tensors(
        "pointwise",
        x=(x, "B C H W"),
        weight=(weight, "D C 1 1"),
        bias=(bias, "D"),
        residual=(residual, "B D H W ?"),
    )
    check_choice("pointwise", "activation", activation, (None, "gelu"))
    if choose("norm_pointwise", x, widest(x, weight)) == "reference":
        return reference.pointwise(x, weight, bias, activation=activation, residual=residual)
    return torch.ops.seemore_fast.norm_pointwise(x, None, None, weight, bias, activation, 0.0, residual)

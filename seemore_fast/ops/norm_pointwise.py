"""Operators `norm_pointwise`, how SEE and GatedFFN begin, and `pointwise`, how SEE ends: one kernel."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .allocation import empty_image
from .autocast import to_autocast_dtype
from .checks import check_together
from .operator import Operator, Values


def _cast(values: Values) -> Values:
    """Normalise x in its own dtype; without a norm, x is what the convolution of autocast's dtype reads."""
    return to_autocast_dtype(
        values, ("weight", "bias") if values["norm_weight"] is not None else ("x", "weight", "bias")
    )


def _results(values: Values) -> tuple[Tensor]:
    weight, residual = values["weight"], values["residual"]
    dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
    return (empty_image(values["x"], weight.shape[0], dtype),)


norm_pointwise = Operator(
    reference.norm_pointwise,
    {
        "x": "B C H W", "norm_weight": "C ?", "norm_bias": "C ?", "weight": "D C 1 1", "bias": "D",
        "residual": "B D H W ?",
    },
    {"activation": "str?", "eps": "float"},
    results=_results,
    autocast=_cast,
    size=lambda values: max(values["x"].shape[1], (values["weight"].shape[0] + 1) // 2),  # kernels are made for C -> 2C
    validate=lambda values, _: check_together(
        "norm_pointwise", norm_weight=values["norm_weight"], norm_bias=values["norm_bias"]
    ),
    outside={"residual": lambda dy: dy},
)  # fmt: skip


@wraps(reference.pointwise)
def pointwise(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return norm_pointwise(x, None, None, weight, bias, **options)

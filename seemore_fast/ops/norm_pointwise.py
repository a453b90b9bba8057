"""Public operator `norm_pointwise`; formula and shapes in `seemore_fast.reference.norm_pointwise`."""

from torch import Tensor

from .. import reference
from .checks import check_choice, check_tensors


def norm_pointwise(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm, 1x1 convolution, activation (None or "gelu")."""
    check_tensors(
        "norm_pointwise",
        x=(x, "B C H W"),
        norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"),
        weight=(weight, "D C 1 1"),
        bias=(bias, "D"),
    )
    check_choice("norm_pointwise", "activation", activation, (None, "gelu"))
    return reference.norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation=activation, eps=eps)

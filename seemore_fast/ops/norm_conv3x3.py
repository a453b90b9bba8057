"""Public operator `norm_conv3x3`; formula and shapes in `seemore_fast.reference.norm_conv3x3`."""

from torch import Tensor

from .. import reference
from .checks import check_choice, check_tensors, check_together


def norm_conv3x3(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    weight_pw: Tensor | None = None,
    bias_pw: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm (or none), dense 3x3 convolution, activation (None or "gelu"), 1x1 convolution (or none)."""
    check_tensors(
        "norm_conv3x3",
        x=(x, "B C H W"),
        norm_weight=(norm_weight, "C ?"),
        norm_bias=(norm_bias, "C ?"),
        weight=(weight, "D C 3 3"),
        bias=(bias, "D"),
        weight_pw=(weight_pw, "P D 1 1 ?"),
        bias_pw=(bias_pw, "P ?"),
    )
    check_together("norm_conv3x3", norm_weight=norm_weight, norm_bias=norm_bias)
    check_together("norm_conv3x3", weight_pw=weight_pw, bias_pw=bias_pw)
    check_choice("norm_conv3x3", "activation", activation, (None, "gelu"))
    return reference.norm_conv3x3(
        x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, activation=activation, eps=eps
    )

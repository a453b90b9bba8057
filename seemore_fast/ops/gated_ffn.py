"""Public operator `gated_ffn`; formula and shapes in `seemore_fast.reference.gated_ffn`."""

from torch import Tensor

from .. import reference
from .checks import check_tensors


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """x + GatedFFN(LayerNorm(x))."""
    check_tensors(
        "gated_ffn",
        x=(x, "B C H W"),
        norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"),
        weight_1=(weight_1, "2C C 1 1"),
        bias_1=(bias_1, "2C"),
        weight_gate=(weight_gate, "C 1 3 3"),
        bias_gate=(bias_gate, "C"),
        weight_2=(weight_2, "C C 1 1"),
        bias_2=(bias_2, "C"),
    )
    return reference.gated_ffn(
        x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps=eps
    )

"""Public operator `sme_block`; formula and shapes in `seemore_fast.reference.sme_block`."""

from torch import Tensor

from .. import ops, reference
from ..backends import is_plain
from ..recompute import again_in_backward
from ..reference.sme_block import see
from .checks import check_odd, check_tensors


def sme_block(
    x: Tensor,
    norm_1_weight: Tensor,
    norm_1_bias: Tensor,
    weight_qv: Tensor,
    bias_qv: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    weight_proj: Tensor,
    bias_proj: Tensor,
    norm_2_weight: Tensor,
    norm_2_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """Spatial Modulating Expert: SEE, then GatedFFN, each with LayerNorm and residual.

    With `recompute`, backward keeps nothing of what SEE makes between its input and its result, but makes it again.
    """
    sizes = check_tensors(
        "sme_block",
        x=(x, "B C H W"),
        norm_1_weight=(norm_1_weight, "C"),
        norm_1_bias=(norm_1_bias, "C"),
        weight_qv=(weight_qv, "2C C 1 1"),
        bias_qv=(bias_qv, "2C"),
        weight_row=(weight_row, "C 1 1 K"),
        bias_row=(bias_row, "C"),
        weight_col=(weight_col, "C 1 K 1"),
        bias_col=(bias_col, "C"),
        weight_proj=(weight_proj, "C C 1 1"),
        bias_proj=(bias_proj, "C"),
        norm_2_weight=(norm_2_weight, "C"),
        norm_2_bias=(norm_2_bias, "C"),
        weight_1=(weight_1, "2C C 1 1"),
        bias_1=(bias_1, "2C"),
        weight_gate=(weight_gate, "C 1 3 3"),
        bias_gate=(bias_gate, "C"),
        weight_2=(weight_2, "C C 1 1"),
        bias_2=(bias_2, "C"),
    )
    check_odd("sme_block", "weight_row", sizes["K"])
    parts = reference if is_plain() else ops
    inputs = (
        x, norm_1_weight, norm_1_bias, weight_qv, bias_qv, weight_row, bias_row, weight_col, bias_col,
        weight_proj, bias_proj, parts,
    )  # fmt: skip
    x = again_in_backward(see, *inputs) if recompute else see(*inputs)
    return parts.gated_ffn(x, norm_2_weight, norm_2_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)

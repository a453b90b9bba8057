"""Public operator `sme_block`; formula and shapes in `seemore_fast.reference.sme_block`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import is_plain
from ..network.recompute import again_in_backward
from ..reference.sme_block import see
from .checks import check_odd, check_tensors
from .gated_ffn import backward as ffn_backward
from .gated_ffn import forward as ffn_forward
from .library import cast_for_autocast
from .node import EPS, can_be_one_node, differentiable_once, halves_like
from .norm_pointwise import backward as pointwise_backward
from .norm_pointwise import forward as pointwise_forward
from .striped_conv import backward as striped_backward
from .striped_conv import forward as striped_forward


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
    see_of = (norm_1_weight, norm_1_bias, weight_qv, bias_qv, weight_row, bias_row, weight_col, bias_col, weight_proj)
    see_of = (*see_of, bias_proj)
    ffn_of = (norm_2_weight, norm_2_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)
    if can_be_one_node(x):
        narrow = cast_for_autocast(*see_of[2:], *ffn_of[2:])
        return Node.apply(x, recompute, *see_of[:2], *narrow[:8], *ffn_of[:2], *narrow[8:])
    parts = reference if is_plain() else ops
    x = again_in_backward(see, x, *see_of, parts) if recompute else see(x, *see_of, parts)
    return parts.gated_ffn(x, *ffn_of)


class Node(torch.autograd.Function):
    """The block, made of kernels: kept are x and what SEE makes of it, and SEE's inside unless `recompute`."""

    @staticmethod
    def forward(ctx, x, recompute, *parameters):
        see_of, ffn_of = parameters[:10], parameters[10:]
        qv, mixed = enhance(x, see_of)
        middle = pointwise_forward(mixed, None, None, *see_of[8:], None, 0.0, x)
        ctx.save_for_backward(x, middle, *parameters, *(() if recompute else (qv, mixed)))
        return ffn_forward(middle, *ffn_of, EPS)

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        x, middle, *saved = ctx.saved_tensors
        see_of, ffn_of = saved[:10], saved[10:18]
        qv, mixed = saved[18:] or enhance(x, see_of)
        dmiddle, *of_ffn = ffn_backward(dy, middle, *ffn_of, EPS)
        dmixed, _, _, *of_proj = pointwise_backward(dmiddle, mixed, None, None, *see_of[8:], None, 0.0)
        q, v = qv.chunk(2, dim=1)
        dqv, dq, dv = halves_like(qv)
        _, *of_stripes, _ = striped_backward(dmixed, q, *see_of[4:8], None, v, dq, dv)
        dx, *of_qv = pointwise_backward(dqv, x, *see_of[:4], "gelu", EPS)
        return dx.add_(dmiddle), None, *of_qv, *of_stripes, *of_proj, *of_ffn


def enhance(x: Tensor, see_of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return q and v, one after the other, and what SEE's projection is given of them."""
    qv = pointwise_forward(x, *see_of[:4], "gelu", EPS, None)
    q, v = qv.chunk(2, dim=1)
    return qv, striped_forward(q, *see_of[4:8], None, v)

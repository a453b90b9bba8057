"""Public operator `rme_block`; formula and shapes in `seemore_fast.reference.rme_block`."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import is_plain
from ..reference.rme_block import channel_shuffle
from .calibrate import backward as calibrate_backward
from .calibrate import check_aggregable
from .calibrate import forward as calibrate_forward
from .checks import check_at_least, check_odd, check_tensors
from .gated_ffn import backward as ffn_backward
from .gated_ffn import forward as ffn_forward
from .library import cast_for_autocast
from .low_rank_experts import backward as experts_backward
from .low_rank_experts import check_ranks
from .low_rank_experts import forward as experts_forward
from .node import EPS, can_be_one_node, differentiable_once, halves_like
from .norm_conv3x3 import backward as conv_backward
from .norm_conv3x3 import forward as conv_forward
from .router import check_top_k, route_backward
from .striped_conv import backward as striped_backward
from .striped_conv_router import MOST_EXPERTS, TAPS
from .striped_conv_router import forward as routed_forward


def rme_block(
    x: Tensor,
    norm_1_weight: Tensor,
    norm_1_bias: Tensor,
    weight_conv: Tensor,
    bias_conv: Tensor,
    weight_expand: Tensor,
    bias_expand: Tensor,
    weight_agg: Tensor,
    bias_agg: Tensor,
    weight_dw: Tensor,
    bias_dw: Tensor,
    weight_pw: Tensor,
    bias_pw: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    weight_router: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_k: Tensor,
    bias_k: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
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
    ranks: Sequence[int],
    top_k: int,
    recursive: int,
    use_shuffle: bool,
) -> Tensor:
    """Rank Modulating Expert: MoRE, then GatedFFN, each with LayerNorm and residual."""
    sizes = check_tensors(
        "rme_block",
        x=(x, "B C H W"),
        norm_1_weight=(norm_1_weight, "C"),
        norm_1_bias=(norm_1_bias, "C"),
        weight_conv=(weight_conv, "C C 3 3"),
        bias_conv=(bias_conv, "C"),
        weight_expand=(weight_expand, "2C C 1 1"),
        bias_expand=(bias_expand, "2C"),
        weight_agg=(weight_agg, "C 1 4 4"),
        bias_agg=(bias_agg, "C"),
        weight_dw=(weight_dw, "C 1 3 3"),
        bias_dw=(bias_dw, "C"),
        weight_pw=(weight_pw, "C C 1 1"),
        bias_pw=(bias_pw, "C"),
        weight_row=(weight_row, "C 1 1 K"),
        bias_row=(bias_row, "C"),
        weight_col=(weight_col, "C 1 K 1"),
        bias_col=(bias_col, "C"),
        weight_router=(weight_router, "E C"),
        weight_a=(weight_a, "R C"),
        bias_a=(bias_a, "R"),
        weight_k=(weight_k, "R C"),
        bias_k=(bias_k, "R"),
        weight_out=(weight_out, "C R"),
        bias_out=(bias_out, "E C"),
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
    check_odd("rme_block", "weight_row", sizes["K"])
    check_ranks("rme_block", ranks, sizes["R"], sizes["E"])
    check_top_k("rme_block", top_k, sizes["E"])
    check_at_least("rme_block", "recursive", recursive, 1)
    check_aggregable("rme_block", "x", sizes["H"], sizes["W"], recursive)
    parameters = (
        norm_1_weight, norm_1_bias, weight_conv, bias_conv, weight_expand, bias_expand,
        weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw,
        weight_row, bias_row, weight_col, bias_col, weight_router,
        weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, weight_proj, bias_proj,
        norm_2_weight, norm_2_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2,
    )  # fmt: skip
    if sizes["K"] in TAPS and sizes["E"] <= MOST_EXPERTS and can_be_one_node(x) and x.dtype != torch.float64:
        if use_shuffle:
            shuffled = (channel_shuffle(p[None])[0] for p in (weight_expand, bias_expand))
            parameters = (*parameters[:4], *shuffled, *parameters[6:])
        wide = (0, 1, 16, 25, 26)  # the norms' and the router's
        narrow = iter(cast_for_autocast(*(p for i, p in enumerate(parameters) if i not in wide)))
        parameters = (p if i in wide else next(narrow) for i, p in enumerate(parameters))
        return Node.apply(x, list(ranks), top_k, recursive, *parameters)
    return reference.rme_block(
        x,
        *parameters,
        ranks=ranks,
        top_k=top_k,
        recursive=recursive,
        use_shuffle=use_shuffle,
        parts=reference if is_plain() else ops,
    )


class Node(torch.autograd.Function):
    """The block, made of kernels: kept are x, both halves of what it is widened to, what the experts read and what the
    feed-forward network does."""

    @staticmethod
    def forward(ctx, x, ranks, top_k, recursive, *parameters):
        expand_of, calibrate_of, stripes_of, weight_router = of_parts(parameters)[:4]
        experts_of, proj_of, ffn_of = of_parts(parameters)[4:]
        widened = conv_forward(x, *expand_of, "gelu", EPS)
        a, k = widened.chunk(2, dim=1)
        a, *routing = routed_forward(a, *stripes_of, weight_router, "gelu", top_k)
        k, maps = calibrate_forward(k, *calibrate_of, recursive)
        middle = experts_forward(a, k, *routing[:2], *experts_of, ranks, *proj_of, x)
        ctx.ranks, ctx.recursive = ranks, recursive
        ctx.save_for_backward(x, widened, a, *routing, k, maps, middle, *parameters)
        return ffn_forward(middle, *ffn_of, EPS)

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        x, widened, a, expert_index, expert_weight, mean, probability, k, maps, middle, *parameters = ctx.saved_tensors
        expand_of, calibrate_of, stripes_of, weight_router = of_parts(parameters)[:4]
        experts_of, proj_of, ffn_of = of_parts(parameters)[4:]
        dmiddle, *of_ffn = ffn_backward(dy, middle, *ffn_of, EPS)
        da, dk, dexpert_weight, *of_experts = experts_backward(
            dmiddle, a, k, expert_index, expert_weight, *experts_of, ctx.ranks, *proj_of
        )
        dmean, of_router = route_backward(dexpert_weight, expert_index, mean, probability, weight_router)
        da.add_((dmean / (x.shape[2] * x.shape[3])).to(da.dtype)[:, :, None, None])
        dwidened, da_in, dk_in = halves_like(widened)
        a_in, k_in = widened.chunk(2, dim=1)
        _, *of_calibrate = calibrate_backward(dk, maps, k_in, *calibrate_of, ctx.recursive, dk_in)
        _, *of_stripes, _ = striped_backward(da, a_in, *stripes_of, "gelu", None, da_in)
        dx, *of_expand = conv_backward(dwidened, x, *expand_of, "gelu", EPS)
        gradients = (*of_expand, *of_calibrate, *of_stripes, of_router, *of_experts, *of_ffn)
        return dx.add_(dmiddle), None, None, None, *gradients


def of_parts(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the parameters of the 3x3 and the widening layer, calibrate, the stripes, the router (one alone), the
    experts, the projection and the feed-forward network."""
    ends = (0, 6, 12, 16, 17, 23, 25, 33)
    parts = [parameters[begin:end] for begin, end in pairwise(ends)]
    return [*parts[:3], parts[3][0], *parts[4:]]

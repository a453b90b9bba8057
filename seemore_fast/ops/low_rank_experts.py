"""Public operator `low_rank_experts`; formula and shapes in `seemore_fast.reference.low_rank_experts`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import implementation
from .checks import check_tensors


def low_rank_experts(
    a: Tensor,
    k: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_k: Tensor,
    bias_k: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    ranks: Sequence[int],
) -> Tensor:
    """a + each image's chosen experts of a and k, weighted. `expert_index` is not read here: it lives on the device."""
    sizes = check_tensors(
        "low_rank_experts",
        a=(a, "B C H W"),
        k=(k, "B C H W"),
        weight_a=(weight_a, "R C"),
        bias_a=(bias_a, "R"),
        weight_k=(weight_k, "R C"),
        bias_k=(bias_k, "R"),
        weight_out=(weight_out, "C R"),
        bias_out=(bias_out, "E C"),
    )
    check_ranks("low_rank_experts", ranks, sizes["R"], sizes["E"])
    routed = check_tensors("low_rank_experts", expert_weight=(expert_weight, "B K"))
    expected = (sizes["B"], routed["K"])
    if routed["B"] != sizes["B"] or tuple(expert_index.shape) != expected:
        raise ValueError(
            f"low_rank_experts: expert_index has shape {tuple(expert_index.shape)} and expert_weight "
            f"{tuple(expert_weight.shape)}, expected both to be (B, top_k) with B = {sizes['B']}"
        )
    if expert_index.dtype != torch.int64:
        raise TypeError(f"low_rank_experts: expert_index has dtype {expert_index.dtype}, expected torch.int64")
    return implementation("low_rank_experts")(
        a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks
    )


def check_ranks(operator: str, ranks: Sequence[int], total: int, num_experts: int):
    """Raise ValueError unless `ranks` are those of `num_experts` experts with `total` packed rows."""
    if len(ranks) != num_experts or sum(ranks) != total or min(ranks, default=0) < 1:
        raise ValueError(
            f"{operator}: ranks are {list(ranks)}, expected {num_experts} positive integers (the rows of bias_out) "
            f"that add up to {total} (the rows of weight_a)"
        )

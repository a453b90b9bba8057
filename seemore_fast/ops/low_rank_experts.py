"""Public operator `low_rank_experts`; formula and shapes in `seemore_fast.reference.low_rank_experts`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .checks import check_device, check_is_tensor, check_tensors


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
    check_routing("low_rank_experts", expert_index, expert_weight, a)
    return reference.low_rank_experts(
        a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks
    )


def check_ranks(operator: str, ranks: Sequence[int], total: int, num_experts: int):
    """Raise ValueError unless `ranks` are those of `num_experts` experts with `total` packed rows."""
    whole = isinstance(ranks, Sequence) and all(type(rank) is int and rank > 0 for rank in ranks)
    if not whole or len(ranks) != num_experts or sum(ranks) != total:
        raise ValueError(
            f"{operator}: ranks are {ranks!r}, expected {num_experts} positive integers (the rows of bias_out) "
            f"that add up to {total} (the rows of weight_a)"
        )


def check_routing(operator: str, expert_index: Tensor, expert_weight: Tensor, a: Tensor):
    """Raise unless index and weight are (B, top_k) on the device of `a`; float32 weights go with any type of `a`."""
    check_is_tensor(operator, "expert_index", expert_index, "B top_k")
    sizes = check_tensors(operator, expert_weight=(expert_weight, "B top_k"))
    expected = (len(a), sizes["top_k"])
    for name, tensor in {"expert_index": expert_index, "expert_weight": expert_weight}.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {expected}, (B, top_k): the batch of a "
                "and the columns of expert_weight"
            )
        check_device(operator, name, tensor, "a", a)
    if expert_index.dtype != torch.int64:
        raise TypeError(f"{operator}: expert_index has dtype {expert_index.dtype}, expected torch.int64")

"""Public operator `low_rank_experts`; formula and shapes in `seemore_fast.reference.low_rank_experts`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_device, check_is_tensor, check_tensors, check_together
from .library import cast_for_autocast, contiguous, define, differentiate, empty_image, empty_like


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
    *,
    weight_proj: Tensor | None = None,
    bias_proj: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """a + each image's chosen experts of a and k, weighted; with a projection, residual + that, projected.

    `expert_index` is not read here: it lives on the device. Kernels leave out an index that is no expert's; the
    reference has torch refuse it. Under autocast products are of autocast's dtype; a and the residual are added in
    their own, which is that of the result if it is the wider one.
    """
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
        weight_proj=(weight_proj, "C C 1 1 ?"),
        bias_proj=(bias_proj, "C ?"),
        residual=(residual, "B C H W ?"),
    )
    check_ranks("low_rank_experts", ranks, sizes["R"], sizes["E"])
    check_routing("low_rank_experts", expert_index, expert_weight, a)
    check_together("low_rank_experts", weight_proj=weight_proj, bias_proj=bias_proj, residual=residual)
    experts = (weight_a, bias_a, weight_k, bias_k, weight_out, bias_out)
    if choose("low_rank_experts", a, _size(a, ranks)) == "reference":
        return reference.low_rank_experts(
            a, k, expert_index, expert_weight, *experts, ranks,
            weight_proj=weight_proj, bias_proj=bias_proj, residual=residual,
        )  # fmt: skip
    *experts, weight_proj, bias_proj = cast_for_autocast(*experts, weight_proj, bias_proj)
    return torch.ops.seemore_fast.low_rank_experts(
        a, k, expert_index, expert_weight, *experts, list(ranks), weight_proj, bias_proj, residual
    )


def _size(a: Tensor, ranks: Sequence[int]) -> int:
    """Return over how many numbers products are summed, at most."""
    return max(a.shape[1], *ranks)


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


def _result(a, weight_out, weight_proj, residual):
    summand = a if weight_proj is None else residual
    return empty_image(a, a.shape[1], torch.promote_types(summand.dtype, weight_out.dtype))


def forward(
    a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks,
    weight_proj, bias_proj, residual,
):  # fmt: skip
    y = _result(a, weight_out, weight_proj, residual)
    routing = contiguous(expert_index, expert_weight)
    experts = contiguous(weight_a, bias_a, weight_k, bias_k, weight_out, bias_out)
    projection = contiguous(weight_proj, bias_proj)
    kernel = kernel_for("low_rank_experts", a, _size(a, ranks))
    kernel(y, a, k, *routing, *experts, ranks, *projection, residual)
    return y


def _forward_fake(
    a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks,
    weight_proj, bias_proj, residual,
):  # fmt: skip
    torch._check(weight_a.shape[1] == a.shape[1], lambda: "low_rank_experts: weight_a and a differ in channels")
    return _result(a, weight_out, weight_proj, residual)


def backward(
    dy, a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks,
    weight_proj, bias_proj,
):  # fmt: skip
    expert_index, *parameters = contiguous(
        expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out
    )
    projection = contiguous(weight_proj, bias_proj)
    gradients = [None if p is None else torch.empty_like(p) for p in (*parameters, *projection)]
    gradients = [empty_like(a), empty_like(k), *gradients]
    kernel = kernel_for("low_rank_experts", a, _size(a, ranks), "_backward")
    kernel(*gradients, dy, a, k, expert_index, *parameters, ranks, projection[0])
    return tuple(a.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    dy, a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks,
    weight_proj, bias_proj,
):  # fmt: skip
    parameters = (expert_weight, weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, weight_proj, bias_proj)
    gradients = (a.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters)
    return empty_like(a), empty_like(k), *gradients


def _save(ctx, inputs, output):
    *tensors, ctx.ranks, weight_proj, bias_proj, residual = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*tensors, weight_proj, bias_proj)


def _gradients(ctx, dy):
    *tensors, weight_proj, bias_proj = ctx.saved_tensors
    backward = torch.ops.seemore_fast.low_rank_experts_backward
    da, dk, *parameters = backward(dy, *tensors, ctx.ranks, weight_proj, bias_proj)
    *parameters, dweight_proj, dbias_proj = parameters
    if weight_proj is None:
        return da, dk, None, *parameters, None, None, None, None
    return da, dk, None, *parameters, None, dweight_proj, dbias_proj, dy.to(ctx.residual_dtype)


_INPUTS = (
    "Tensor a, Tensor k, Tensor expert_index, Tensor expert_weight, Tensor weight_a, Tensor bias_a, Tensor weight_k, "
    "Tensor bias_k, Tensor weight_out, Tensor bias_out, int[] ranks, Tensor? weight_proj, Tensor? bias_proj"
)
define("low_rank_experts", f"({_INPUTS}, Tensor? residual) -> Tensor", forward, _forward_fake)
# da, dk and those of the parameters, expert_weight first and the projection's last (empty without one)
define(
    "low_rank_experts_backward",
    f"(Tensor dy, {_INPUTS}) -> ({', '.join(['Tensor'] * 11)})",
    backward,
    _backward_fake,
)
differentiate("low_rank_experts", _save, _gradients)

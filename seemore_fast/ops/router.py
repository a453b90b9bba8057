"""Public operator `router`, and `route`, its second half; formula and shapes in `seemore_fast.reference.router`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from ..reference.router import route as reference_route
from .checks import check_device, check_tensors
from .library import define, differentiate

MOST_EXPERTS = 1024  # kernels compare every expert with every other; beyond, torch's sort wins


def router(a: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Indices (int64) and probabilities (float32) of each image's `top_k` experts, both (B, top_k)."""
    sizes = check_tensors("router", a=(a, "B C H W"), weight=(weight, "E C"))
    check_top_k("router", top_k, sizes["E"])
    if sizes["E"] > MOST_EXPERTS or choose("router", a) == "reference":
        return reference.router(a, weight, top_k)
    expert_weight, expert_index, *_ = torch.ops.seemore_fast.router(a, weight, top_k)
    return expert_index, expert_weight


def route(mean: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Do what `router` does after the pool, for who has each image's mean (B, C) already; of any floating types."""
    sizes = check_tensors("route", mean=(mean, "B C"))
    experts = check_tensors("route", weight=(weight, "E C"))
    if experts["C"] != sizes["C"]:
        raise ValueError(
            f"route: weight has shape {tuple(weight.shape)}, expected (E, C) with C = {sizes['C']}, as mean has it"
        )
    check_device("route", "weight", weight, "mean", mean)
    check_top_k("route", top_k, experts["E"])
    if experts["E"] > MOST_EXPERTS or choose("router", mean) == "reference":
        return reference_route(mean, weight, top_k)
    wide = torch.promote_types(mean.dtype, torch.float32)
    expert_weight, expert_index, _ = torch.ops.seemore_fast.route(mean.to(wide), weight, top_k)
    return expert_index, expert_weight


def check_top_k(operator: str, top_k: int, num_experts: int):
    """Raise ValueError unless `top_k` experts can be chosen of `num_experts`."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_experts:
        raise ValueError(f"{operator}: top_k is {top_k!r}, expected 1 to {num_experts}, the number of experts")


def _decision(like: Tensor, batch: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for expert_weight, expert_index and probability."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return (
        like.new_empty((batch, top_k), dtype=wide),
        like.new_empty((batch, top_k), dtype=torch.int64),
        like.new_empty((batch, experts), dtype=wide),
    )


def _router(a, weight, top_k):
    expert_weight, expert_index, mean, probability = results = _router_fake(a, weight, top_k)
    kernel_for("router", a)(expert_index, expert_weight, mean, probability, a, weight.contiguous(), top_k)
    return results


def _router_fake(a, weight, top_k):
    torch._check(weight.shape[1] == a.shape[1], lambda: "router: weight and a differ in channels")
    expert_weight, expert_index, probability = _decision(a, a.shape[0], weight.shape[0], top_k)
    mean = a.new_empty(a.shape[:2], dtype=probability.dtype)
    return expert_weight, expert_index, mean, probability


def _router_backward(dexpert_weight, expert_index, mean, probability, weight, size, dtype, channels_last):
    weight = weight.contiguous()
    da, dweight = _room_for_da(mean, size, dtype, channels_last), torch.empty_like(weight)
    run = kernel_for("router", da, part="_backward")
    run(da, dweight, dexpert_weight, expert_index, mean, probability, weight)
    return da, dweight


def _router_backward_fake(dexpert_weight, expert_index, mean, probability, weight, size, dtype, channels_last):
    return _room_for_da(mean, size, dtype, channels_last), weight.new_empty(weight.shape)


def _room_for_da(mean, size, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=mean.device, memory_format=layout)


def _route(mean, weight, top_k):
    expert_weight, expert_index, probability = results = _route_fake(mean, weight, top_k)
    run = kernel_for("router", mean, part="_from_sums")
    run(expert_index, expert_weight, None, probability, mean.contiguous()[None], weight.contiguous(), 1, top_k)
    return results


def _route_fake(mean, weight, top_k):
    torch._check(weight.shape[1] == mean.shape[1], lambda: "route: weight and mean differ in channels")
    return _decision(mean, mean.shape[0], weight.shape[0], top_k)


def route_backward(dexpert_weight, expert_index, mean, probability, weight):
    mean, weight = mean.contiguous(), weight.contiguous()
    dmean, dweight = torch.empty_like(mean), torch.empty_like(weight)
    run = kernel_for("router", mean, part="_from_sums_backward")
    run(dmean, dweight, dexpert_weight, expert_index, mean, probability, weight)
    return dmean, dweight


def _route_backward_fake(dexpert_weight, expert_index, mean, probability, weight):
    return mean.new_empty(mean.shape), weight.new_empty(weight.shape)


def _save_router(ctx, inputs, output):
    a, weight, _ = inputs
    _, expert_index, mean, probability = output
    ctx.mark_non_differentiable(expert_index, mean, probability)
    ctx.save_for_backward(expert_index, mean, probability, weight)
    # of `a` no more than what its gradient looks like: who overwrites `a` may
    ctx.size, ctx.dtype = a.shape, a.dtype
    ctx.channels_last = not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last)


def _router_gradients(ctx, dexpert_weight, *_):
    saved = ctx.saved_tensors
    backward = torch.ops.seemore_fast.router_backward
    return *backward(dexpert_weight, *saved, ctx.size, ctx.dtype, ctx.channels_last), None


def _save_route(ctx, inputs, output):
    mean, weight, _ = inputs
    _, expert_index, probability = output
    ctx.mark_non_differentiable(expert_index, probability)
    ctx.save_for_backward(expert_index, mean, probability, weight)


def _route_gradients(ctx, dexpert_weight, *_):
    return *torch.ops.seemore_fast.route_backward(dexpert_weight, *ctx.saved_tensors), None


_SAVED = "Tensor dexpert_weight, Tensor expert_index, Tensor mean, Tensor probability, Tensor weight"
# expert_weight, expert_index, mean, probability: the last two for the gradient. torch's opcheck adds up all results in
# the dtype of the first one.
define(
    "router",
    "(Tensor a, Tensor weight, int top_k) -> (Tensor, Tensor, Tensor, Tensor)",
    _router,
    _router_fake,
)
# da, dweight
define(
    "router_backward",
    f"({_SAVED}, SymInt[] size, ScalarType dtype, bool channels_last) -> (Tensor, Tensor)",
    _router_backward,
    _router_backward_fake,
)
differentiate("router", _save_router, _router_gradients)
# expert_weight, expert_index, probability
define("route", "(Tensor mean, Tensor weight, int top_k) -> (Tensor, Tensor, Tensor)", _route, _route_fake)
# dmean, dweight
define("route_backward", f"({_SAVED}) -> (Tensor, Tensor)", route_backward, _route_backward_fake)
differentiate("route", _save_route, _route_gradients)

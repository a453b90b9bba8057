"""Operator `router`: the choice of experts of MoRE, once an image."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import lookup_kernel, select_backend
from .operator import Operator, P, R, Values

MOST_EXPERTS = 1024  # kernels compare every expert with every other; beyond, torch's sort wins


def check_top_k(operator: str, top_k: int, num_experts: int):
    """Raise ValueError unless `top_k` experts can be chosen of `num_experts`."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_experts:
        raise ValueError(f"{operator}: top_k is {top_k!r}, expected 1 to {num_experts}, the number of experts")


def empty_decision(x: Tensor, weight: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return room for a router's results on images x (B, C, H, W), in at least float32 but for the int64 index."""
    (batch, channels), wide = x.shape[:2], torch.promote_types(x.dtype, torch.float32)
    return {
        "index": x.new_empty((batch, top_k), dtype=torch.int64),
        "weight": x.new_empty((batch, top_k), dtype=wide),
        "mean": x.new_empty((batch, channels), dtype=wide),
        "probability": x.new_empty((batch, len(weight)), dtype=wide),
    }


def gradients_of_decision(
    dweight: Tensor,
    index: Tensor,
    mean: Tensor,
    probability: Tensor,
    weight_router: Tensor,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the mean (B, C) and of the router's weight (E, C), which is written to `into` if given.

    `dweight` is the gradient of the experts' probabilities.
    """
    mean, weight_router = mean.contiguous(), weight_router.contiguous()
    gradients = torch.empty_like(mean), torch.empty_like(weight_router) if into is None else into
    kernel = lookup_kernel("router", mean, part="_from_sums_backward")
    kernel(*gradients, dweight, index, mean, probability, weight_router)
    return gradients


class Router(Operator[P, R]):
    """`router`, whose backward needs nothing of the image but its shape, type and layout."""

    RESULTS = ("weight", "index", "mean", "probability")  # weight first: opcheck adds up all in the first one's dtype
    returns = 4
    backward_schema = (
        "(Tensor dweight, Tensor index, Tensor mean, Tensor probability, Tensor weight, SymInt[] size, "
        "ScalarType dtype, bool channels_last) -> (Tensor, Tensor)"
    )

    def compute(self, values: Values) -> Any:
        if len(values["weight"]) > MOST_EXPERTS or select_backend("router", values["a"]) == "reference":
            return reference.router(**values)
        weight, index, *_ = self.packet(*values.values())
        return index, weight

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        a, weight, top_k = args
        made = empty_decision(a, weight, top_k)
        lookup_kernel("router", a)(*made.values(), a, weight.contiguous(), top_k)
        return tuple(made[name] for name in self.RESULTS)

    def backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        index, mean, probability, weight, *_ = args
        da, dweight_router = self.fake_backward(dy, *args)
        kernel = lookup_kernel("router", da, part="_backward")
        kernel(da, dweight_router, dy, index, mean, probability, weight.contiguous())
        return da, dweight_router

    def fake_backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        _, mean, _, weight, size, dtype, channels_last = args
        layout = torch.channels_last if channels_last else torch.contiguous_format
        da = torch.empty(size, dtype=dtype, device=mean.device, memory_format=layout)
        return da, torch.empty_like(weight, memory_format=torch.contiguous_format)

    def _save(self, ctx: Any, inputs: tuple, output: Any):
        a, weight, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], weight)
        # Of `a` no more than the form of its gradient: in-place changes of `a` are allowed.
        ctx.size, ctx.dtype = a.shape, a.dtype
        ctx.channels_last = not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last)

    def _differentiate(self, ctx: Any, dy: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        return *self.backward_packet(dy, *ctx.saved_tensors, ctx.size, ctx.dtype, ctx.channels_last), None


router = Router(
    reference.router,
    {"a": "B C H W", "weight": "E C"},
    {"top_k": "int"},
    results=lambda v: tuple(empty_decision(v["a"], v["weight"], v["top_k"])[name] for name in Router.RESULTS),
    validate=lambda values, sizes: check_top_k("router", values["top_k"], sizes["E"]),
)

"""Operator `striped_conv_router`: a striped convolution, and the router that pools its result, in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import backend_of, lookup_kernel, select_backend
from .allocation import empty_like
from .checks import check_odd
from .operator import Operator, P, R, Values
from .router import MOST_EXPERTS, check_top_k, empty_decision, gradients_of_decision, router
from .striped_conv import STRIPES, striped_conv

TAPS = (3, 7, 11)  # of the kernels


def has_kernel(taps: int, experts: int) -> bool:
    """Return whether kernels are made for so many taps and experts."""
    return taps in TAPS and experts <= MOST_EXPERTS


def _validate(values: Values, sizes: dict[str, int]):
    check_odd("striped_conv_router", "weight_row", sizes["K"])
    check_top_k("striped_conv_router", values["top_k"], sizes["E"])


class StripedConvRouter(Operator[P, R]):
    """`striped_conv_router`; where it has no kernel, its two operators by themselves."""

    returns = 5  # y, index, weight, mean, probability: the last two for backward

    def compute(self, values: Values) -> Any:
        x, *stripes, weight_router, top_k, activation = values.values()
        is_made = has_kernel(stripes[0].shape[3], len(weight_router)) and len(x) > 0
        if not is_made or select_backend(self.name, x) == "reference":
            y = striped_conv(x, *stripes, activation=activation)
            return y, *router(y, weight_router, top_k)
        return self.packet(*values.values())[:3]

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        x, *parameters, weight_router, top_k, activation = args
        y, made = empty_like(x), empty_decision(x, weight_router, top_k)
        stripes = (p.contiguous() for p in parameters)
        sums = lookup_kernel(self.name, x)(y, x, *stripes, activation == "gelu")
        decide = lookup_kernel("router", x, part="_from_sums")
        decide(*made.values(), sums, weight_router.contiguous(), x.shape[2] * x.shape[3], top_k)
        return y, *made.values()

    backward_schema = (
        "(Tensor dy, Tensor dweight, Tensor index, Tensor mean, Tensor probability, Tensor x, Tensor weight_row, "
        "Tensor bias_row, Tensor weight_col, Tensor bias_col, Tensor weight_router, str? activation) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the gradients of x, of the stripes and of the router's weight."""
        dweight, index, mean, probability, x, *stripes, weight_router, activation = args
        dmean, dweight_router = gradients_of_decision(dweight, index, mean, probability, weight_router)
        dx, _, *gradients = stripes_backward({}, dy, dmean, x, *stripes, activation)
        return dx, *gradients, dweight_router

    def fake_backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        _, _, _, _, x, *parameters, _ = args
        return empty_like(x), *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)

    def _save(self, ctx: Any, inputs: tuple, output: Any):
        *tensors, _, ctx.activation = inputs
        _, index, _, mean, probability = output
        ctx.mark_non_differentiable(index, mean, probability)
        ctx.save_for_backward(index, mean, probability, *tensors)

    def _differentiate(self, ctx: Any, dy: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        _, dweight, *_ = others
        return *self.backward_packet(dy, dweight, *ctx.saved_tensors, ctx.activation), None, None


def stripes_backward(
    into: dict[str, Tensor | None], dy: Tensor, dmean: Tensor, x: Tensor, *stripes_and_activation: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of `striped_conv` in the memory of `into`; dmean (B, C) is that of its pooled result."""
    if backend_of("striped_conv", x, stripes_and_activation[0].shape[3]) == "triton":
        return striped_conv.backward_into(into, dy, x, *stripes_and_activation, None, dmean=dmean)
    return striped_conv.backward_into(into, dy + spread_over_pixels(dmean, x), x, *stripes_and_activation, None)


def spread_over_pixels(dmean: Tensor, x: Tensor) -> Tensor:
    """Return the gradient (B, C, 1, 1) of each pixel of x from that of the mean over them (B, C)."""
    return (dmean / (x.shape[2] * x.shape[3])).to(x.dtype)[:, :, None, None]


striped_conv_router = StripedConvRouter(
    reference.striped_conv_router,
    {"x": "B C H W", **STRIPES, "weight_router": "E C autocast"},
    {"top_k": "int", "activation": "str?"},
    results=lambda v: (empty_like(v["x"]), *empty_decision(v["x"], v["weight_router"], v["top_k"]).values()),
    autocast=("x", *STRIPES),
    one_dtype=True,
    validate=_validate,
)

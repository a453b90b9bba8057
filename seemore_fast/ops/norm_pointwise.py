"""Public operator `norm_pointwise`; formula and shapes in `seemore_fast.reference.norm_pointwise`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_choice, check_tensors
from .library import cast_for_autocast, define, differentiate, empty_image


def norm_pointwise(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm, 1x1 convolution, activation (None or "gelu").

    Under autocast x is normalised in its own dtype; the convolution and what follows are of autocast's.
    """
    weight, bias = cast_for_autocast(weight, bias)
    check_tensors(
        "norm_pointwise",
        x=(x, "B C H W"),
        norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"),
        weight=(weight, "D C 1 1"),
        bias=(bias, "D"),
    )
    check_choice("norm_pointwise", "activation", activation, (None, "gelu"))
    if choose("norm_pointwise", x, _size(x, weight)) == "reference":
        return reference.norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation=activation, eps=eps)
    return torch.ops.seemore_fast.norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation, eps)


def _size(x, weight):
    return max(x.shape[1], (weight.shape[0] + 1) // 2)  # kernels are made for C -> 2C


def _forward(x, norm_weight, norm_bias, weight, bias, activation, eps):
    y = empty_image(x, len(weight), weight.dtype)
    parameters = (p.contiguous() for p in (norm_weight, norm_bias, weight, bias))
    kernel_for("norm_pointwise", x, _size(x, weight))(y, x, *parameters, activation, eps)
    return y


def _forward_fake(x, norm_weight, norm_bias, weight, bias, activation, eps):
    torch._check(weight.shape[1] == x.shape[1], lambda: "norm_pointwise: weight and x differ in channels")
    return empty_image(x, weight.shape[0], weight.dtype)


def _backward(dy, x, norm_weight, norm_bias, weight, bias, activation, eps):
    dx = torch.empty_like(x)
    parameters = [p.contiguous() for p in (norm_weight, norm_bias, weight, bias)]
    gradients = [torch.empty_like(p) for p in parameters]
    run = kernel_for("norm_pointwise", x, _size(x, weight), "_backward")
    run(dx, *gradients, dy, x, *parameters, activation, eps)
    return dx, *gradients


def _backward_fake(dy, x, norm_weight, norm_bias, weight, bias, activation, eps):
    return torch.empty_like(x), *(p.new_empty(p.shape) for p in (norm_weight, norm_bias, weight, bias))


def _save(ctx, inputs, output):
    *tensors, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    backward = torch.ops.seemore_fast.norm_pointwise_backward
    return *backward(dy, *ctx.saved_tensors, ctx.activation, ctx.eps), None, None


_INPUTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, str? activation, float eps"
)
define("norm_pointwise", f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
# dx, dnorm_weight, dnorm_bias, dweight, dbias
define(
    "norm_pointwise_backward",
    f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("norm_pointwise", _save, _gradients)

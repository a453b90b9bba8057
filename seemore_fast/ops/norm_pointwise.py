"""Public operator `norm_pointwise`; formula and shapes in `seemore_fast.reference.norm_pointwise`.

The dispatcher's operator does without a norm and adds a residual, too, as `pointwise` wants it.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_choice, check_tensors
from .library import cast_for_autocast, contiguous, define, differentiate, empty_image, empty_like


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
    if choose("norm_pointwise", x, widest(x, weight)) == "reference":
        return reference.norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation=activation, eps=eps)
    return torch.ops.seemore_fast.norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation, eps, None)


def widest(x: Tensor, weight: Tensor) -> int:
    """Return how wide a layer is to its kernels, which are made for C -> 2C."""
    return max(x.shape[1], (weight.shape[0] + 1) // 2)


def forward(x, norm_weight, norm_bias, weight, bias, activation, eps, residual):
    y = empty_image(x, weight.shape[0], _dtype(weight, residual))
    parameters = contiguous(norm_weight, norm_bias, weight, bias)
    kernel_for("norm_pointwise", x, widest(x, weight))(y, x, *parameters, activation == "gelu", eps, residual)
    return y


def _forward_fake(x, norm_weight, norm_bias, weight, bias, activation, eps, residual):
    torch._check(weight.shape[1] == x.shape[1], lambda: "norm_pointwise: weight and x differ in channels")
    return empty_image(x, weight.shape[0], _dtype(weight, residual))


def _dtype(weight, residual):
    return weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)


def backward(dy, x, norm_weight, norm_bias, weight, bias, activation, eps):
    parameters = contiguous(norm_weight, norm_bias, weight, bias)
    dx, gradients = empty_like(x), [None if p is None else torch.empty_like(p) for p in parameters]
    run = kernel_for("norm_pointwise", x, widest(x, weight), "_backward")
    run(dx, *gradients, dy, x, *parameters, activation == "gelu", eps)
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(dy, x, norm_weight, norm_bias, weight, bias, activation, eps):
    parameters = (norm_weight, norm_bias, weight, bias)
    return empty_like(x), *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters)


def _save(ctx, inputs, output):
    *tensors, ctx.activation, ctx.eps, residual = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    saved = ctx.saved_tensors
    backward = torch.ops.seemore_fast.norm_pointwise_backward
    dx, *norm, dweight, dbias = backward(dy, *saved, ctx.activation, ctx.eps)
    norm = (None, None) if saved[1] is None else norm
    return dx, *norm, dweight, dbias, None, None, None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)


_INPUTS = "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, str? activation, float eps"
define("norm_pointwise", f"({_INPUTS}, Tensor? residual) -> Tensor", forward, _forward_fake)
# dx, dnorm_weight and dnorm_bias (empty without a norm), dweight, dbias
define(
    "norm_pointwise_backward",
    f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
differentiate("norm_pointwise", _save, _gradients)

"""Public operator `norm_conv3x3`; formula and shapes in `seemore_fast.reference.norm_conv3x3`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_choice, check_tensors, check_together
from .library import cast_for_autocast, contiguous, define, differentiate, empty_image, empty_like, stencil


def norm_conv3x3(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    weight_pw: Tensor | None = None,
    bias_pw: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm (or none), dense 3x3 convolution, activation (None or "gelu"), 1x1 convolution (or none).

    Under autocast x is normalised in its own dtype; the convolutions and what follows are of autocast's.
    """
    convolutions = cast_for_autocast(weight, bias, weight_pw, bias_pw)
    weight, bias, weight_pw, bias_pw = convolutions
    if norm_weight is None:
        (x,) = cast_for_autocast(x)
    check_tensors(
        "norm_conv3x3",
        x=(x, "B C H W"),
        norm_weight=(norm_weight, "C ?"),
        norm_bias=(norm_bias, "C ?"),
        weight=(weight, "D C 3 3"),
        bias=(bias, "D"),
        weight_pw=(weight_pw, "P D 1 1 ?"),
        bias_pw=(bias_pw, "P ?"),
    )
    check_together("norm_conv3x3", norm_weight=norm_weight, norm_bias=norm_bias)
    check_together("norm_conv3x3", weight_pw=weight_pw, bias_pw=bias_pw)
    check_choice("norm_conv3x3", "activation", activation, (None, "gelu"))
    if choose("norm_conv3x3", x, widest(weight, weight_pw)) == "reference":
        return reference.norm_conv3x3(x, norm_weight, norm_bias, *convolutions, activation=activation, eps=eps)
    return torch.ops.seemore_fast.norm_conv3x3(x, norm_weight, norm_bias, *convolutions, activation, eps)


def widest(weight: Tensor, weight_pw: Tensor | None) -> int:
    """Return how wide the operator is to its kernels, which are made for C -> C -> 2C."""
    return max(*weight.shape[:2], 0 if weight_pw is None else (len(weight_pw) + 1) // 2)


def _result(x, weight, weight_pw):
    return empty_image(x, len(weight if weight_pw is None else weight_pw), weight.dtype)


def forward(x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, activation, eps):
    y = _result(x, weight, weight_pw)
    norm_weight, norm_bias, bias, weight_pw, bias_pw = contiguous(norm_weight, norm_bias, bias, weight_pw, bias_pw)
    parameters = norm_weight, norm_bias, stencil(weight, x), bias, weight_pw, bias_pw
    kernel_for("norm_conv3x3", x, widest(weight, weight_pw))(y, x, *parameters, activation == "gelu", eps)
    return y


def norm_conv3x3_into(
    y: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    add: bool = False,
):
    """Write to y, of any floating dtype, or add to it, what `norm_conv3x3` returns; by Triton, without gradients.

    Nothing is checked: it is a part of the network.
    """
    weight, bias = cast_for_autocast(weight, bias)
    torch.ops.seemore_fast.norm_conv3x3_into(y, x, norm_weight, norm_bias, weight, bias, eps, add)


def _into(y, x, norm_weight, norm_bias, weight, bias, eps, add):
    norm_weight, norm_bias, bias = contiguous(norm_weight, norm_bias, bias)
    run = kernel_for("norm_conv3x3", x, widest(weight, None), "_into")
    run(y, x, norm_weight, norm_bias, stencil(weight, x), bias, eps, add)


def _into_fake(y, x, norm_weight, norm_bias, weight, bias, eps, add):
    torch._check(weight.shape[1] == x.shape[1], lambda: "norm_conv3x3: weight and x differ in channels")


def _forward_fake(x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, activation, eps):
    torch._check(weight.shape[1] == x.shape[1], lambda: "norm_conv3x3: weight and x differ in channels")
    return _result(x, weight, weight_pw)


def backward(dy, x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, activation, eps):
    parameters = contiguous(norm_weight, norm_bias, weight, bias, weight_pw, bias_pw)
    dx, gradients = empty_like(x), [None if p is None else torch.empty_like(p) for p in parameters]
    run = kernel_for("norm_conv3x3", x, widest(weight, weight_pw), "_backward")
    run(dx, *gradients, dy, x, *parameters, activation == "gelu", eps)
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(dy, x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, activation, eps):
    parameters = (norm_weight, norm_bias, weight, bias, weight_pw, bias_pw)
    return empty_like(x), *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters)


def _save(ctx, inputs, output):
    *tensors, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    tensors = ctx.saved_tensors
    dx, *gradients = torch.ops.seemore_fast.norm_conv3x3_backward(dy, *tensors, ctx.activation, ctx.eps)
    gradients = (None if p is None else gradient for p, gradient in zip(tensors[1:], gradients, strict=True))
    return dx, *gradients, None, None


_INPUTS = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, "
    "Tensor? weight_pw, Tensor? bias_pw, str? activation, float eps"
)
define("norm_conv3x3", f"({_INPUTS}) -> Tensor", forward, _forward_fake)
# dx and those of the parameters, empty where there is none
define("norm_conv3x3_backward", f"(Tensor dy, {_INPUTS}) -> ({', '.join(['Tensor'] * 7)})", backward, _backward_fake)
differentiate("norm_conv3x3", _save, _gradients)
define(
    "norm_conv3x3_into",
    "(Tensor(a!) y, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, float eps, bool add) "
    "-> ()",
    _into,
    _into_fake,
)

"""Public operator `gated_ffn`; formula and shapes in `seemore_fast.reference.gated_ffn`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_tensors
from .library import cast_for_autocast, contiguous, define, differentiate, empty_like, stencil


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """x + GatedFFN(LayerNorm(x)).

    Under autocast x is normalised and added in its own dtype, which is that of the result if it is the wider one; the
    convolutions are of autocast's.
    """
    convolutions = cast_for_autocast(weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)
    weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2 = convolutions
    check_tensors(
        "gated_ffn",
        x=(x, "B C H W"),
        norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"),
        weight_1=(weight_1, "2C C 1 1"),
        bias_1=(bias_1, "2C"),
        weight_gate=(weight_gate, "C 1 3 3"),
        bias_gate=(bias_gate, "C"),
        weight_2=(weight_2, "C C 1 1"),
        bias_2=(bias_2, "C"),
    )
    if choose("gated_ffn", x, x.shape[1]) == "reference":
        return reference.gated_ffn(x, norm_weight, norm_bias, *convolutions, eps=eps)
    return torch.ops.seemore_fast.gated_ffn(x, norm_weight, norm_bias, *convolutions, eps)


def _result(x, weight_2):
    return empty_like(x, torch.promote_types(x.dtype, weight_2.dtype))


def forward(x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps):
    y = _result(x, weight_2)
    first = contiguous(norm_weight, norm_bias, weight_1, bias_1)
    second = contiguous(bias_gate, weight_2, bias_2)
    kernel_for("gated_ffn", x, x.shape[1])(y, x, *first, stencil(weight_gate, x), *second, eps)
    return y


def _forward_fake(x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps):
    torch._check(weight_1.shape[1] == x.shape[1], lambda: "gated_ffn: weight_1 and x differ in channels")
    return _result(x, weight_2)


def backward(dy, x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps):
    parameters = contiguous(norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)
    gradients = [empty_like(x), *(torch.empty_like(p) for p in parameters)]
    kernel_for("gated_ffn", x, x.shape[1], "_backward")(*gradients, dy, x, *parameters, eps)
    return tuple(gradients)


def _backward_fake(dy, x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps):
    parameters = (norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)
    return empty_like(x), *(p.new_empty(p.shape) for p in parameters)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    return *torch.ops.seemore_fast.gated_ffn_backward(dy, *ctx.saved_tensors, ctx.eps), None


_INPUTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight_1, Tensor bias_1, Tensor weight_gate, "
    "Tensor bias_gate, Tensor weight_2, Tensor bias_2, float eps"
)
define("gated_ffn", f"({_INPUTS}) -> Tensor", forward, _forward_fake)
# dx and those of the parameters
define(
    "gated_ffn_backward",
    f"(Tensor dy, {_INPUTS}) -> ({', '.join(['Tensor'] * 9)})",
    backward,
    _backward_fake,
)
differentiate("gated_ffn", _save, _gradients)

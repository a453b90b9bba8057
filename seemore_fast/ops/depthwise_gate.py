"""Public operator `depthwise_gate`; formula and shapes in `seemore_fast.reference.depthwise_gate`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_tensors
from .library import cast_for_autocast, define, differentiate, empty_like


def depthwise_gate(u: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u * depthwise3x3(g).

    Under autocast all of it is done in autocast's dtype, like a convolution of torch.
    """
    u, g, weight, bias = cast_for_autocast(u, g, weight, bias)
    check_tensors(
        "depthwise_gate",
        one_dtype=True,
        u=(u, "B C H W"),
        g=(g, "B C H W"),
        weight=(weight, "C 1 3 3"),
        bias=(bias, "C"),
    )
    if choose("depthwise_gate", u) == "reference":
        return reference.depthwise_gate(u, g, weight, bias)
    return torch.ops.seemore_fast.depthwise_gate(u, g, weight, bias)


def _forward(u, g, weight, bias):
    y = empty_like(u)
    kernel_for("depthwise_gate", u)(y, u, g, weight.contiguous(), bias.contiguous())
    return y


def _forward_fake(u, g, weight, bias):
    torch._check(u.shape == g.shape, lambda: "depthwise_gate: u and g differ in shape")
    return empty_like(u)


def _backward(dy, u, g, weight, bias):
    weight, bias = weight.contiguous(), bias.contiguous()
    gradients = [empty_like(u), empty_like(g), torch.empty_like(weight), torch.empty_like(bias)]
    kernel_for("depthwise_gate", u, part="_backward")(*gradients, dy, u, g, weight, bias)
    return tuple(gradients)


def _backward_fake(dy, u, g, weight, bias):
    return empty_like(u), empty_like(g), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    return torch.ops.seemore_fast.depthwise_gate_backward(dy, *ctx.saved_tensors)


define("depthwise_gate", "(Tensor u, Tensor g, Tensor weight, Tensor bias) -> Tensor", _forward, _forward_fake)
# du, dg, dweight, dbias
define(
    "depthwise_gate_backward",
    "(Tensor dy, Tensor u, Tensor g, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("depthwise_gate", _save, _gradients)

"""Public operator `striped_conv`; formula and shapes in `seemore_fast.reference.striped_conv`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_choice, check_odd, check_tensors
from .library import cast_for_autocast, define, differentiate, empty_like


def striped_conv(
    x: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Depthwise 1xK, then Kx1, then activation (None or "gelu") and product with `gate`.

    Under autocast all of it is done in autocast's dtype, like a convolution of torch.
    """
    x, weight_row, bias_row, weight_col, bias_col, gate = cast_for_autocast(
        x, weight_row, bias_row, weight_col, bias_col, gate
    )
    sizes = check_tensors(
        "striped_conv",
        one_dtype=True,
        x=(x, "B C H W"),
        weight_row=(weight_row, "C 1 1 K"),
        bias_row=(bias_row, "C"),
        weight_col=(weight_col, "C 1 K 1"),
        bias_col=(bias_col, "C"),
        gate=(gate, "B C H W ?"),
    )
    check_odd("striped_conv", "weight_row", sizes["K"])
    check_choice("striped_conv", "activation", activation, (None, "gelu"))
    if choose("striped_conv", x, sizes["K"]) == "reference":
        return reference.striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation=activation, gate=gate)
    return torch.ops.seemore_fast.striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation, gate)


def forward(x, weight_row, bias_row, weight_col, bias_col, activation, gate):
    y = empty_like(x)
    parameters = (p.contiguous() for p in (weight_row, bias_row, weight_col, bias_col))
    kernel_for("striped_conv", x, weight_row.shape[3])(y, x, *parameters, activation == "gelu", gate)
    return y


def _forward_fake(x, weight_row, bias_row, weight_col, bias_col, activation, gate):
    torch._check(weight_row.shape[0] == x.shape[1], lambda: "striped_conv: weight_row and x differ in channels")
    torch._check(weight_row.shape[3] == weight_col.shape[2], lambda: "striped_conv: the two weights differ in taps")
    return empty_like(x)


def backward(dy, x, weight_row, bias_row, weight_col, bias_col, activation, gate, dx=None, dgate=None):
    if dx is None:
        dx = empty_like(x)
    if dgate is None:
        dgate = x.new_empty(0) if gate is None else empty_like(gate)
    parameters = [p.contiguous() for p in (weight_row, bias_row, weight_col, bias_col)]
    gradients = [torch.empty_like(p) for p in parameters]
    run = kernel_for("striped_conv", x, weight_row.shape[3], "_backward")
    run(dx, None if gate is None else dgate, *gradients, dy, x, *parameters, activation == "gelu", gate)
    return dx, *gradients, dgate


def _backward_fake(dy, x, weight_row, bias_row, weight_col, bias_col, activation, gate):
    parameters = (p.new_empty(p.shape) for p in (weight_row, bias_row, weight_col, bias_col))
    return empty_like(x), *parameters, x.new_empty(0) if gate is None else empty_like(gate)


def _save(ctx, inputs, output):
    *tensors, ctx.activation, gate = inputs
    ctx.save_for_backward(*tensors, gate)


def _gradients(ctx, dy):
    *tensors, gate = ctx.saved_tensors
    *gradients, dgate = torch.ops.seemore_fast.striped_conv_backward(dy, *tensors, ctx.activation, gate)
    return *gradients, None, None if gate is None else dgate


_INPUTS = (
    "Tensor x, Tensor weight_row, Tensor bias_row, Tensor weight_col, Tensor bias_col, str? activation, Tensor? gate"
)
define("striped_conv", f"({_INPUTS}) -> Tensor", forward, _forward_fake)
# dx, those of the parameters, dgate (empty without a gate)
define(
    "striped_conv_backward",
    f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
differentiate("striped_conv", _save, _gradients)

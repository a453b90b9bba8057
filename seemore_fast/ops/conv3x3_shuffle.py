"""Public operator `conv3x3_shuffle`; formula and shapes in `seemore_fast.reference.conv3x3_shuffle`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from ..reference.router import without_autocast
from .checks import check_at_least, check_tensors
from .library import contiguous, define, differentiate, empty_like, stencil


def conv3x3_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, *, scale: int, img_range: float = 1.0
) -> Tensor:
    """3x3 convolution, pixel shuffle, division by img_range, sum with mean: in float32 at least, autocast or not.

    Dtypes may differ: the result has that of x, if it is the wider one. On a backend without a kernel of its own,
    that of `norm_conv3x3` makes the convolution.
    """
    x, weight, bias, mean = _widen(x, weight, bias, mean)
    sizes = check_tensors(
        "conv3x3_shuffle",
        x=(x, "B C H W"),
        weight=(weight, "D C 3 3"),
        bias=(bias, "D"),
        mean=(mean, "1 I 1 1"),
    )
    check_at_least("conv3x3_shuffle", "scale", scale, 1)
    if not isinstance(img_range, int | float) or not img_range > 0:
        raise ValueError(f"conv3x3_shuffle: img_range is {img_range!r}, expected a positive number")
    if sizes["D"] != sizes["I"] * scale**2:
        raise ValueError(
            f"conv3x3_shuffle: weight has shape {tuple(weight.shape)}, expected {sizes['I'] * scale**2} output "
            f"channels: {scale}^2 for each of the {sizes['I']} that mean has"
        )
    widest = max(sizes["C"], sizes["D"])
    with without_autocast(x.device.type):  # for which a kernel would have to have its dtype, too
        if choose("conv3x3_shuffle", x, widest) != "reference":
            return torch.ops.seemore_fast.conv3x3_shuffle(x, weight, bias, mean, scale, float(img_range))
    if choose("norm_conv3x3", x, widest) == "reference":
        return reference.conv3x3_shuffle(x, weight, bias, mean, scale=scale, img_range=img_range)
    y = torch.ops.seemore_fast.norm_conv3x3(x, None, None, weight, bias, None, None, None, 0.0)
    return F.pixel_shuffle(y, scale) / img_range + mean


def _widen(x, *others) -> tuple:
    """Return the tensors in the dtype of x, or float32; what is no floating tensor as it is: the check refuses it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x, *others
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *others))


def _result(x, mean, scale):
    batch, _, height, width = x.shape
    size = (batch, mean.shape[1], scale * height, scale * width)
    return torch.empty_like(x[:, :1, :1, :1].expand(size), memory_format=torch.contiguous_format)


def _forward(x, weight, bias, mean, scale, img_range):
    y = _result(x, mean, scale)
    run = kernel_for("conv3x3_shuffle", x, max(weight.shape[:2]))
    run(y, x, stencil(weight, x), *contiguous(bias, mean), scale, img_range)
    return y


def _forward_fake(x, weight, bias, mean, scale, img_range):
    torch._check(weight.shape[1] == x.shape[1], lambda: "conv3x3_shuffle: weight and x differ in channels")
    return _result(x, mean, scale)


def _backward(dy, x, weight, bias, scale, img_range):
    weight, bias = contiguous(weight, bias)
    gradients = [empty_like(x), torch.empty_like(weight), torch.empty_like(bias)]
    run = kernel_for("conv3x3_shuffle", x, max(weight.shape[:2]), "_backward")
    run(*gradients, dy, x, weight, bias, scale, img_range)
    return tuple(gradients)


def _backward_fake(dy, x, weight, bias, scale, img_range):
    return empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    x, weight, bias, _, ctx.scale, ctx.img_range = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, dy):
    gradients = torch.ops.seemore_fast.conv3x3_shuffle_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.img_range)
    dmean = dy.sum(dim=(0, 2, 3), keepdim=True) if ctx.needs_input_grad[3] else None
    return *gradients, dmean, None, None


_INPUTS = "Tensor x, Tensor weight, Tensor bias"
_OPTIONS = "int scale, float img_range"
define("conv3x3_shuffle", f"({_INPUTS}, Tensor mean, {_OPTIONS}) -> Tensor", _forward, _forward_fake)
define(
    "conv3x3_shuffle_backward",
    f"(Tensor dy, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("conv3x3_shuffle", _save, _gradients)

"""Public operator `calibrate`; formula and shapes in `seemore_fast.reference.calibrate`."""

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, kernel_for
from .checks import check_at_least, check_tensors
from .library import define, differentiate, empty_like


def calibrate(
    k: Tensor,
    weight_agg: Tensor,
    bias_agg: Tensor,
    weight_dw: Tensor,
    bias_dw: Tensor,
    weight_pw: Tensor,
    bias_pw: Tensor,
    recursive: int,
) -> Tensor:
    """k + a smooth map of its surroundings, gathered at 1 / 4^recursive of its size.

    Under autocast y has k's dtype, as with torch's own operators: kernels take the parameters in it, too.
    """
    parameters = _cast_for_autocast(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw)
    weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw = parameters
    sizes = check_tensors(
        "calibrate",
        one_dtype=True,
        k=(k, "B C H W"),
        weight_agg=(weight_agg, "C 1 4 4"),
        bias_agg=(bias_agg, "C"),
        weight_dw=(weight_dw, "C 1 3 3"),
        bias_dw=(bias_dw, "C"),
        weight_pw=(weight_pw, "C C 1 1"),
        bias_pw=(bias_pw, "C"),
    )
    check_at_least("calibrate", "recursive", recursive, 1)
    check_aggregable("calibrate", "k", sizes["H"], sizes["W"], recursive)
    if choose("calibrate", k) == "reference":
        return reference.calibrate(k, *parameters, recursive)
    return torch.ops.seemore_fast.calibrate(k, *parameters, recursive)[0]


def check_aggregable(operator: str, name: str, height: int, width: int, recursive: int):
    """Raise ValueError for an image that `recursive` aggregations leave nothing of."""
    least = 4**recursive
    if height < least or width < least:
        raise ValueError(
            f"{operator}: {name} is {height}x{width} pixels, expected at least {least}x{least} "
            f"for recursive = {recursive}: pad it by replication"
        )


def _cast_for_autocast(k, *parameters):
    """Under autocast, return the parameters in k's dtype, but float64 ones, and all for a k of float64.

    torch's convolutions would be of autocast's dtype and their sum with k of k's: so is ours, and reads k as it is.
    """
    if not isinstance(k, Tensor) or not k.is_floating_point() or k.dtype == torch.float64:
        return parameters
    if not torch.is_autocast_enabled(k.device.type):
        return parameters
    return tuple(
        p.to(k.dtype) if isinstance(p, Tensor) and p.is_floating_point() and p.dtype != torch.float64 else p
        for p in parameters
    )


def _empty_maps(k: Tensor, recursive: int) -> Tensor:
    """Room for what forward leaves to backward: csrc/calibrate.h, `maps_elements`."""
    batch, channels, height, width = k.shape
    cells = batch * channels * (height // 4**recursive) * (width // 4**recursive)
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty(cells * (1 + (16**recursive - 1) // 15), dtype=dtype)


def forward(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive):
    y, maps = empty_like(k), _empty_maps(k, recursive)
    parameters = (p.contiguous() for p in (weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw))
    kernel_for("calibrate", k)(y, maps, k, *parameters, recursive)
    return y, maps


def _forward_fake(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive):
    torch._check(weight_agg.shape[0] == k.shape[1], lambda: "calibrate: weight_agg and k differ in channels")
    return empty_like(k), _empty_maps(k, recursive)


def backward(dy, maps, k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive, dk=None):
    if dk is None:
        dk = empty_like(k)
    parameters = [p.contiguous() for p in (weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw)]
    gradients = [torch.empty_like(p) for p in parameters]
    kernel_for("calibrate", k, part="_backward")(dk, *gradients, dy, maps, k, *parameters, recursive)
    return dk, *gradients


def _backward_fake(dy, maps, k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive):
    parameters = (weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw)
    return empty_like(k), *(p.new_empty(p.shape) for p in parameters)


def _save(ctx, inputs, output):
    *tensors, ctx.recursive = inputs
    _, maps = output
    ctx.mark_non_differentiable(maps)
    ctx.save_for_backward(maps, *tensors)


def _gradients(ctx, dy, _):
    return *torch.ops.seemore_fast.calibrate_backward(dy, *ctx.saved_tensors, ctx.recursive), None


_INPUTS = (
    "Tensor k, Tensor weight_agg, Tensor bias_agg, Tensor weight_dw, Tensor bias_dw, Tensor weight_pw, "
    "Tensor bias_pw, int recursive"
)
define("calibrate", f"({_INPUTS}) -> (Tensor, Tensor)", forward, _forward_fake)  # y, the small maps
# dk and those of the parameters
define(
    "calibrate_backward",
    f"(Tensor dy, Tensor maps, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
differentiate("calibrate", _save, _gradients)

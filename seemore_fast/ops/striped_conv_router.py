"""Public operator `striped_conv_router`; formula and shapes in `seemore_fast.reference.striped_conv_router`."""

import torch
from torch import Tensor

from ..backends import choose, kernel_for
from .checks import check_choice, check_odd, check_tensors
from .library import LIBRARY, cast_for_autocast, define, empty_like
from .router import MOST_EXPERTS, check_top_k, router
from .striped_conv import striped_conv

TAPS = (3, 7, 11)  # of the kernels


def striped_conv_router(
    x: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    weight_router: Tensor,
    top_k: int,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y of `striped_conv`, and indices and probabilities of `router` for y.

    Under autocast the convolution is done in autocast's dtype; the router stays float32.
    """
    x, weight_row, bias_row, weight_col, bias_col = cast_for_autocast(x, weight_row, bias_row, weight_col, bias_col)
    sizes = check_tensors(
        "striped_conv_router",
        one_dtype=True,
        x=(x, "B C H W"),
        weight_row=(weight_row, "C 1 1 K"),
        bias_row=(bias_row, "C"),
        weight_col=(weight_col, "C 1 K 1"),
        bias_col=(bias_col, "C"),
    )
    sizes |= check_tensors("striped_conv_router", x=(x, "B C H W"), weight_router=(weight_router, "E C"))
    check_odd("striped_conv_router", "weight_row", sizes["K"])
    check_choice("striped_conv_router", "activation", activation, (None, "gelu"))
    check_top_k("striped_conv_router", top_k, sizes["E"])
    convolution = x, weight_row, bias_row, weight_col, bias_col
    no_kernel = sizes["K"] not in TAPS or sizes["E"] > MOST_EXPERTS or sizes["B"] == 0
    if no_kernel or choose("striped_conv_router", x) == "reference":
        y = striped_conv(*convolution, activation=activation)
        return y, *router(y, weight_router, top_k)
    return torch.ops.seemore_fast.striped_conv_router(*convolution, weight_router, activation, top_k)[:3]


def forward(x, weight_row, bias_row, weight_col, bias_col, weight_router, activation, top_k):
    y, index, weight, mean, probability = results = _forward_fake(
        x, weight_row, bias_row, weight_col, bias_col, weight_router, activation, top_k
    )
    parameters = (p.contiguous() for p in (weight_row, bias_row, weight_col, bias_col))
    sums = kernel_for("striped_conv_router", x)(y, x, *parameters, activation == "gelu")
    pixels = x.shape[2] * x.shape[3]
    run = kernel_for("router", x, part="_from_sums")
    run(index, weight, mean, probability, sums, weight_router.contiguous(), pixels, top_k)
    return results


def _forward_fake(x, weight_row, bias_row, weight_col, bias_col, weight_router, activation, top_k):
    torch._check(weight_row.shape[0] == x.shape[1], lambda: "striped_conv_router: weight_row and x differ in channels")
    batch, wide = x.shape[0], dict(dtype=torch.float32)
    return (
        empty_like(x),
        x.new_empty((batch, top_k), dtype=torch.int64),
        x.new_empty((batch, top_k), **wide),
        x.new_empty(x.shape[:2], **wide),
        x.new_empty((batch, weight_router.shape[0]), **wide),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.activation, _ = inputs
    _, expert_index, _, mean, probability = output
    ctx.mark_non_differentiable(expert_index, mean, probability)
    ctx.save_for_backward(*tensors, expert_index, mean, probability)


def _gradients(ctx, dy, _, dexpert_weight, *rest):
    *convolution, weight_router, expert_index, mean, probability = ctx.saved_tensors
    dmean, dweight_router = torch.ops.seemore_fast.route_backward(
        dexpert_weight, expert_index, mean, probability, weight_router
    )
    x = convolution[0]
    dy = dy + (dmean / (x.shape[2] * x.shape[3])).to(dy.dtype)[:, :, None, None]
    gradients = torch.ops.seemore_fast.striped_conv_backward(dy, *convolution, ctx.activation, None)
    return *gradients[:5], dweight_router, None, None


# y, expert_index, expert_weight, mean, probability: the last two for the gradient, which is that of two operators
define(
    "striped_conv_router",
    "(Tensor x, Tensor weight_row, Tensor bias_row, Tensor weight_col, Tensor bias_col, Tensor weight_router, "
    "str? activation, int top_k) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    _forward_fake,
)
torch.library.register_autograd("seemore_fast::striped_conv_router", _gradients, setup_context=_save, lib=LIBRARY)

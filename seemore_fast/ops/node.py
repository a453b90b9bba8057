"""A block as one node of autograd's graph, where one backend has kernels for all of its operators.

The operators' kernels are called one after another, without a node, a check and a dispatcher's call for each, and
halves of an image get their gradients as such, in place. Results are those of the operators by themselves.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ..backends import choose, is_plain
from ..network.recompute import is_transformed
from .library import refuse_second_derivative

EPS = 1e-6  # of LayerNorm
OPERATORS = ("norm_pointwise", "norm_conv3x3", "striped_conv", "calibrate", "low_rank_experts", "gated_ffn")


def can_be_one_node(x: Tensor) -> bool:
    """Tell whether a block of x can be one node: on a CPU, in eager mode, with images in the batch."""
    if is_plain() or torch.compiler.is_compiling() or is_transformed() or x.device.type != "cpu":
        return False
    return len(x) > 0 and all(choose(operator, x, x.shape[1]) == "cpu" for operator in OPERATORS)


def halves_like(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradient of an image, and its two halves of the channels."""
    whole = torch.empty_like(image)
    return whole, *whole.chunk(2, dim=1)


def differentiable_once(backward: Callable) -> Callable:
    """Make a node's backward(ctx, dy) refuse to be differentiated, as that of an operator does."""

    @wraps(backward)
    def without_gradient(ctx, dy):
        with torch.no_grad():
            gradients = backward(ctx, dy)
        return Refusal.apply(dy, *gradients) if torch.is_grad_enabled() else gradients

    return without_gradient


class Refusal(torch.autograd.Function):
    """Gradients as they are, none of which has a gradient."""

    @staticmethod
    def forward(ctx, dy, *gradients):
        return gradients

    @staticmethod
    def backward(ctx, *gradients):
        refuse_second_derivative("a block of SeemoRe", ctx)

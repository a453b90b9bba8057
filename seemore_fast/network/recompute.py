"""Memory for time in training: what a part of the network made is not kept for backward but made again there."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends

CHOICES = ("auto", "none", "block")


def check_recompute(how: str):
    """Raise ValueError for what is no choice."""
    if how not in CHOICES:
        raise ValueError(f"recompute is {how!r}, expected one of {', '.join(map(repr, CHOICES))}")


def is_transformed() -> bool:
    """Tell whether this runs inside a transform of torch.func."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def again_in_backward(function: Callable[..., Tensor], *inputs) -> Tensor:
    """Return function(*inputs), of which backward keeps the inputs alone: it calls the function again, on its backend.

    Where no gradient is recorded, or in a transform of torch.func, which allows no such thing, it is a call as any.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return function(*inputs)
    chosen = backends.current()

    def run(*inputs) -> Tensor:
        if torch.compiler.is_compiling():  # a graph has its backends in it already
            return function(*inputs)
        with backends.use_backend(chosen):
            return function(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

"""Questions about torch's state for which it has no public function."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._C._functorch import get_dynamic_layer_stack_depth
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)


def is_transformed() -> bool:
    """Return whether this runs inside a transform of torch.func."""
    return get_dynamic_layer_stack_depth() > 0


def has_forward_gradients() -> bool:
    """Return whether this runs inside forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_observed() -> bool:
    """Return whether a dispatch mode or a compiler sees the operators that run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def constant_in_graphs(function: F) -> F:
    """Mark a function whose answers torch.compile takes as they are, instead of tracing how it finds them.

    torch.compiler.assume_constant_result would import all of torch's compiler.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function

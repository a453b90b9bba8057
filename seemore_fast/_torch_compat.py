"""Questions about torch's state for which it has no public function."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether this runs inside a transform of torch.func."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def has_forward_gradients() -> bool:
    """Return whether this runs inside forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_observed() -> bool:
    """Return whether a dispatch mode or a compiler sees the operators that run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0

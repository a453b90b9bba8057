"""Activation checkpointing: recomputing in backward instead of storing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends
from .._torch_compat import is_transformed

CHOICES = ("auto", "none", "block")  # of `SeemoRe.recompute`


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return function(*inputs), of which only the inputs are stored: backward calls the function again, on its backend.

    Where no gradient is recorded, or in a transform of torch.func, which does not allow it, this is a plain call.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return function(*inputs)
    chosen = backends.current_backend()

    def run(*inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():  # a graph has its backends in it already
            return function(*inputs)
        with backends.use_backend(chosen):
            return function(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

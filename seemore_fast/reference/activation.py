"""The activations that an operator can apply to its own result."""

import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply ``"gelu"`` (the exact one, x * Phi(x) by erf) or, for None, nothing. Any shape, any floating type."""
    return F.gelu(x) if activation == "gelu" else x

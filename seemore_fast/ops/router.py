"""Public operator `router`; formula and shapes in `seemore_fast.reference.router`."""

from torch import Tensor

from .. import reference
from .checks import check_tensors


def router(a: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Indices (int64) and probabilities (float32) of each image's `top_k` experts, both (B, top_k)."""
    sizes = check_tensors("router", a=(a, "B C H W"), weight=(weight, "E C"))
    check_top_k("router", top_k, sizes["E"])
    return reference.router(a, weight, top_k)


def check_top_k(operator: str, top_k: int, num_experts: int):
    """Raise ValueError unless `top_k` experts can be chosen of `num_experts`."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_experts:
        raise ValueError(f"{operator}: top_k is {top_k!r}, expected 1 to {num_experts}, the number of experts")

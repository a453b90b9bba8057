"""Public operator `depthwise_gate`; formula and shapes in `seemore_fast.reference.depthwise_gate`."""

from torch import Tensor

from .. import reference
from .checks import check_tensors


def depthwise_gate(u: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u * depthwise3x3(g)."""
    check_tensors("depthwise_gate", u=(u, "B C H W"), g=(g, "B C H W"), weight=(weight, "C 1 3 3"), bias=(bias, "C"))
    return reference.depthwise_gate(u, g, weight, bias)

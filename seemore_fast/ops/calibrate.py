"""Public operator `calibrate`; formula and shapes in `seemore_fast.reference.calibrate`."""

from torch import Tensor

from .. import reference
from .checks import check_at_least, check_tensors


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
    """k + a smooth map of its surroundings, gathered at 1 / 4^recursive of its size."""
    sizes = check_tensors(
        "calibrate",
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
    return reference.calibrate(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive)


def check_aggregable(operator: str, name: str, height: int, width: int, recursive: int):
    """Raise ValueError for an image that `recursive` aggregations leave nothing of."""
    least = 4**recursive
    if height < least or width < least:
        raise ValueError(
            f"{operator}: {name} is {height}x{width} pixels, expected at least {least}x{least} "
            f"for recursive = {recursive}: pad it by replication"
        )

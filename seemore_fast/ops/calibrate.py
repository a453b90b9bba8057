"""Operator `calibrate`: the aggregation branch of MoRE."""

import torch
from torch import Tensor

from .. import reference
from .allocation import empty_like
from .autocast import autocast_dtype, castable
from .checks import check_at_least
from .operator import Operator, Values


def check_aggregable(operator: str, name: str, height: int, width: int, recursive: int):
    """Raise ValueError for an image that `recursive` aggregations leave nothing of."""
    least = 4**recursive
    if height < least or width < least:
        raise ValueError(
            f"{operator}: {name} is {height}x{width} pixels, expected at least {least}x{least} "
            f"for recursive = {recursive}: pad it by replication"
        )


def _validate(values: Values, sizes: dict[str, int]):
    check_at_least("calibrate", "recursive", values["recursive"], 1)
    check_aggregable("calibrate", "k", sizes["H"], sizes["W"], values["recursive"])


def _cast(values: Values) -> Values:
    """Under autocast, return the parameters in k's dtype, but float64 ones, and all for a k of float64.

    torch's convolutions would be of autocast's dtype and their sum with k of k's: so is ours, and reads k as it is.
    """
    k = values["k"]
    if not castable(k) or autocast_dtype(k) is None:
        return values
    return {name: v.to(k.dtype) if castable(v) else v for name, v in values.items()}


def _results(values: Values) -> tuple[Tensor, Tensor]:
    """Return room for y, and for the maps that backward reads: `maps_elements` of csrc/params/calibrate.h."""
    k, recursive = values["k"], values["recursive"]
    batch, channels, height, width = k.shape
    cells = batch * channels * (height // 4**recursive) * (width // 4**recursive)
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return empty_like(k), k.new_empty(cells * (1 + (16**recursive - 1) // 15), dtype=dtype)


calibrate = Operator(
    reference.calibrate,
    {
        "k": "B C H W", "weight_agg": "C 1 4 4", "bias_agg": "C", "weight_dw": "C 1 3 3", "bias_dw": "C",
        "weight_pw": "C C 1 1", "bias_pw": "C",
    },
    {"recursive": "int"},
    results=_results,
    autocast=_cast,
    one_dtype=True,
    validate=_validate,
    kept=1,
)  # fmt: skip

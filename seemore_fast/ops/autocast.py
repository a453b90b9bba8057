"""Autocast policy of operators."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on the device of x, None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def castable(value: object) -> bool:
    """Return whether autocast may cast a value: a floating tensor that is not float64."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def to_autocast_dtype(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Under autocast, return `values` with the named ones in its dtype, as torch does for convolutions.

    Anything but floating tensors is returned as it is, for the check that follows to refuse.
    """
    first = next(iter(values.values()))
    dtype = autocast_dtype(first) if isinstance(first, Tensor) else None
    if dtype is None:
        return values
    return {k: v.to(dtype) if k in names and castable(v) else v for k, v in values.items()}

"""Operators that sweep over images, and images that are cut into strips of each kind."""

import torch
from torch import Tensor

from seemore_fast import ops

from ..ops import cast, random_parameters, striped_shapes, value_and_gradients

STRIPS = {
    "one, of pixels": (2, 2, 5, 7),
    "some, of quads": (1, 1, 45, 132),
    "some, of pairs": (1, 1, 45, 70),
    "some, of pixels": (1, 1, 45, 69),
}


def sweep(name: str, shape: tuple[int, ...], taps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y and the gradients of an operator, by the library that is loaded."""
    shapes = {"x": shape, "gate": shape} | striped_shapes(shape[1], taps)
    return value_and_gradients(getattr(ops, name), cast(random_parameters(shapes, "cpu"), dtype), activation="gelu")


SWEEPS = [("striped_conv", 3), ("striped_conv", 7), ("striped_conv", 11)]

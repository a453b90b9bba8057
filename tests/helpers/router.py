"""Tensors and checks that the tests of the router share."""

import functools
import math

from .ops import random_parameters


def tensors_of(device, shape=(3, 5, 6, 7), experts=4, sharpness=5):
    tensors = random_parameters({"a": shape, "weight": (experts, shape[1])}, device)
    tensors["weight"] *= sharpness * math.prod(shape[2:]) ** 0.5  # the pool of noise is near 0
    return tensors


def weight_of(operator):
    """The operator's one differentiable result."""

    @functools.wraps(operator)
    def expert_weight(*tensors, top_k=2, **named):
        return operator(*tensors, **named, top_k=top_k)[1]

    return expert_weight

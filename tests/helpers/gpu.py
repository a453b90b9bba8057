"""Calls of all operators, for tests of what only a GPU shows, and tensors of most of its memory."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seemore_fast import ops

from .ops import calibrate_shapes, cast, ffn_shapes, norm_shapes, random_parameters, striped_shapes


class Call(NamedTuple):
    """One use of an operator."""

    operator: str
    images: tuple[str, ...]  # its arguments of the shape of the first
    parameters: Callable[[int], dict[str, tuple[int, ...]]]  # from channels to shapes
    options: dict
    workspace: int = 7  # images of 16 bits that it needs at most besides its arguments, its result and their gradients

    def tensors(self, device: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
        """Return its arguments, and "upstream", the gradient of its result, as the last."""
        shapes = dict.fromkeys(self.images, shape) | self.parameters(shape[1])
        is_router = self.operator.endswith("router")
        shapes["upstream"] = (shape[0], self.options["top_k"]) if is_router else shape
        tensors = cast(random_parameters(shapes, device, seed), dtype)
        return tensors | {"upstream": tensors["upstream"].float()} if is_router else tensors

    def forward(self, tensors: dict[str, Tensor], module=ops) -> list[Tensor]:
        """Return the results, one of them floating: the last."""
        arguments = {name: t for name, t in tensors.items() if name != "upstream"}
        results = getattr(module, self.operator)(**arguments, **self.options)
        return [results] if isinstance(results, Tensor) else list(results)

    def both(self, tensors: dict[str, Tensor], module=ops) -> list[Tensor]:
        """Return the results, and the gradients of all arguments."""
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "upstream"}
        results = self.forward(leaves, module)
        gradients = torch.autograd.grad(results[-1], list(leaves.values()), tensors["upstream"])
        return [*(result.detach() for result in results), *gradients]


def router_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (3, channels)}


def routed_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return striped_shapes(channels, 3) | {"weight_router": (3, channels)}


def pointwise_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (channels, channels, 1, 1), "bias": (channels,)}


def norm_pointwise_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return norm_shapes(channels) | pointwise_shapes(channels)


def norm_conv_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return norm_shapes(channels) | {"weight": (channels, channels, 3, 3), "bias": (channels,)}


def normed_ffn_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return norm_shapes(channels) | ffn_shapes(channels)


CALLS = {
    "striped_conv K=11 alone": Call("striped_conv", ("x",), partial(striped_shapes, taps=11), {}),
    **{
        f"striped_conv K={taps}": Call(
            "striped_conv", ("x", "gate"), partial(striped_shapes, taps=taps), {"activation": "gelu"}
        )
        for taps in (3, 5, 7, 11, 31)
    },
    "calibrate 1": Call("calibrate", ("k",), calibrate_shapes, {"recursive": 1}),
    "calibrate 2": Call("calibrate", ("k",), calibrate_shapes, {"recursive": 2}),
    "router": Call("router", ("a",), router_shapes, {"top_k": 1}),
    "striped_conv_router": Call("striped_conv_router", ("x",), routed_shapes, {"top_k": 1}),
    "norm_pointwise": Call("norm_pointwise", ("x",), norm_pointwise_shapes, {"activation": "gelu"}),
    "pointwise": Call("pointwise", ("x", "residual"), pointwise_shapes, {}),
    "norm_conv3x3": Call("norm_conv3x3", ("x",), norm_conv_shapes, {"activation": "gelu"}, workspace=12),
    # twice as many channels, their gradient and the hidden images in float32, two in 16 bits and 48 channels
    "gated_ffn": Call("gated_ffn", ("x",), normed_ffn_shapes, {}, workspace=13),
}


HUGE = (1, 36, 8192, 8192)  # 2.4e9 elements


def huge_tensors(call: Call, device: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return bfloat16 arguments with random images of `shape`; skip where they and the rest do not fit."""
    image = 2 * torch.Size(shape).numel()
    needed = image * (2 * len(call.images) + 2 + call.workspace)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < needed:
            pytest.skip(f"{needed / 1e9:.0f} GB of GPU memory needed, {free / 1e9:.0f} free")
    tensors = call.tensors(device, torch.bfloat16, (1, shape[1], 16, 16))
    images = {name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for name in call.images}
    return tensors | images

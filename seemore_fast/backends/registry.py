"""Kernels by operator: the backends that have them, and for which devices, dtypes and sizes."""

from typing import NamedTuple, TypedDict

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALL = (torch.float64, *FLOATS)
CPU = (torch.float32, torch.float64, torch.bfloat16)


class Limits(TypedDict, total=False):
    """What kernels of one kind share; see `Kernel`."""

    capability: tuple[int, int]
    most: int


# Triton's kernels compile without spills for GPUs of these compute capabilities and newer: stencils, and layers whose
# products take matrix units, which Triton does not use before sm_80, and registers for up to so many channels.
STENCIL: Limits = {"capability": (7, 5)}
MATRIX: Limits = {"capability": (8, 0), "most": 64}


class Kernel(NamedTuple):
    """A backend that has an operator: on which devices, for which dtypes, up to how many channels, for which taps.

    For fewer than `least` elements of x ``"auto"`` takes the reference, which has less overhead (measured:
    benchmarks/cases.py).
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...] = ALL
    most: int = 2**31  # channels, where these are summed over
    taps: tuple[int, ...] = ()  # of a convolution; none for any number
    least: int = 0
    capability: tuple[int, int] = (0, 0)  # least compute capability of a GPU
    row_major: bool = False  # takes images whose pixels of a row lie side by side, and copies of others (row_major.py)


# In the order in which "auto" prefers them where none was measured (`preferences`). The reference computes the rest.
KERNELS: dict[str, list[Kernel]] = {
    "striped_conv": [
        Kernel("cpu", "cpu", CPU),
        Kernel("cuda", "cuda", FLOATS, taps=(3, 7, 11), row_major=True),
        Kernel("triton", "cuda", **STENCIL),
    ],
    "striped_conv_router": [
        Kernel("cpu", "cpu", (torch.float32, torch.bfloat16)),
        Kernel("cuda", "cuda", FLOATS, row_major=True),
        Kernel("triton", "cuda", FLOATS, **STENCIL),
    ],
    "calibrate": [
        Kernel("cpu", "cpu", CPU),
        Kernel("cuda", "cuda", row_major=True),
        Kernel("triton", "cuda", **STENCIL),
    ],
    "router": [Kernel("cpu", "cpu", CPU), Kernel("cuda", "cuda"), Kernel("triton", "cuda", **STENCIL)],
    "norm_pointwise": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "norm_conv3x3": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "conv3x3_shuffle": [Kernel("triton", "cuda", (torch.float32,), **MATRIX)],
    "gated_ffn": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "low_rank_experts": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "network": [Kernel("cpu", "cpu", FLOATS), Kernel("cuda", "cuda", FLOATS, **MATRIX)],
}
BACKENDS = ("cpu", "cuda", "triton")

"""The operators' benchmark cases: sizes, inputs, and the operations and bytes that each one needs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from seemore_fast.benchmarks import harness

Shapes = dict[str, tuple[int, ...]]

# Sizes that matter on a GPU: T at 480x640, a batch of training patches, B and L at 720p
PHOTO, PATCHES, LARGE = (1, 36, 480, 640), (32, 36, 64, 64), (1, 48, 720, 1280)
ON_CUDA = [(shape, dtype) for shape in (PHOTO, PATCHES, LARGE) for dtype in (torch.float32, torch.bfloat16)]
ON_CUDA.append((PHOTO, torch.float16))
# On a CPU: what T upscales to 720p, and the patches
CPU_PHOTO = (1, 36, 360, 640)
ON_CPU = [(CPU_PHOTO, torch.float32), (CPU_PHOTO, torch.bfloat16), (PATCHES, torch.float32)]

RANKS, CHOSEN = (2, 4, 8), 2  # T's ranks, and the expert chosen for every image: the largest
EXPERTS, TOP_K = len(RANKS), 1
SCALE, PLANES = 2, 3  # of conv3x3_shuffle
ROUTER_TAPS = 3  # of striped_conv_router, as MoRE has it


class Setting(NamedTuple):
    """Size, dtype and mode of one case. Only some operators read the last four fields."""

    shape: tuple[int, int, int, int]  # of the first image: (B, C, H, W)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "forward"
    taps: int | None = None
    activation: str | None = None
    gated: bool = False
    recursive: int | None = None

    @property
    def channels(self) -> int:
        return self.shape[1]

    def title(self) -> str:
        words = {
            f"K={self.taps}": self.taps,
            self.activation: self.activation,
            "gate": self.gated,
            f"recursive={self.recursive}": self.recursive,
            harness.SHORT[self.dtype]: True,
            "channels_last": self.channels_last,
        }
        return " ".join([self.mode, "x".join(map(str, self.shape)), *(word for word, given in words.items() if given)])

    def multiply_adds(self, per_element: int, forward: int, backward: int) -> tuple[int, int]:
        """Return (forward, backward) operations of so many products for each element of the first image."""
        operations = 2 * per_element * math.prod(self.shape)
        return forward * operations, backward * operations


QUICK = [Setting((1, 5, 9, 14)), Setting((2, 4, 9, 14), torch.bfloat16, channels_last=True)]
# Over few pixels, one rounding of bfloat16 decides which of a block's gradients has the larger error.
QUICK_BLOCK = [QUICK[0], Setting((2, 8, 24, 24), torch.bfloat16, channels_last=True)]
CPU, CUDA = ([Setting(*setting) for setting in settings] for settings in (ON_CPU, ON_CUDA))
IN_SEE, IN_MORE = {"taps": 11, "gated": True}, {"taps": 3, "activation": "gelu"}  # striped_conv's two places


class Operator(NamedTuple):
    """Inputs, results and costs of an operator, as functions of a Setting.

    `operations` are (forward, backward), two for a multiply-add. Elementwise work (norms, GELU, products) and what
    backward recomputes by choice are left out. Without `traffic`, every input and result counts once.
    """

    operations: Callable[[Setting], tuple[int, int]]
    parameters: Callable[[Setting], Shapes] = lambda s: {}
    images: tuple[str, ...] = ("x",)
    results: Callable[[Setting], list[tuple[int, ...]]] = lambda s: [s.shape]
    options: Callable[[Setting, torch.device], dict] = lambda s, device: {}
    traffic: Callable[[Setting], tuple[int, int]] | None = None
    block: str | None = None  # name in a residual group, for what is timed as a module
    quick: list[Setting] = QUICK
    cpu: list[Setting] = CPU
    cuda: list[Setting] = CUDA

    def cases(self) -> dict[str, dict[str, Setting]]:
        """Return the settings in every mode, by title, for quick trials, a CPU and a GPU."""
        found = {}
        for kind, settings in {"quick": self.quick, "cpu": self.cpu, "cuda": self.cuda}.items():
            in_modes = [setting._replace(mode=mode) for mode in harness.MODES for setting in settings]
            found[kind] = {setting.title(): setting for setting in in_modes}
        return found


def in_mode(counted: tuple[int, int], mode: str) -> int:
    """Return the count of a mode from those of forward and backward."""
    forward, backward = counted
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def layer(suffix: str, outputs: int, inputs: int, height: int = 1, width: int = 1) -> Shapes:
    return {f"weight{suffix}": (outputs, inputs, height, width), f"bias{suffix}": (outputs,)}


def norm(s: Setting) -> Shapes:
    return {"norm_weight": (s.channels,), "norm_bias": (s.channels,)}


def doubled(s: Setting) -> list[tuple[int, ...]]:
    batch, channels, *size = s.shape
    return [(batch, 2 * channels, *size)]


def striped(s: Setting) -> Shapes:
    return layer("_row", s.channels, 1, 1, s.taps) | layer("_col", s.channels, 1, s.taps, 1)


def striped_operations(s: Setting) -> tuple[int, int]:
    """Count two convolutions forward. Backward has the gradients to each one's input and weight.

    It needs the first convolution again for the second's weight gradient, and the second only where an activation or a
    gate needs its result.
    """
    recomputed = 1 + (s.activation is not None or s.gated)
    return s.multiply_adds(s.taps, 2, 4 + recomputed)


def calibrate_operations(s: Setting) -> tuple[int, int]:
    """Count the aggregations, the depthwise 3x3 and the pointwise layer of the small map, and the interpolation.

    An aggregation takes one multiply-add for each element that it reads, the interpolation four for each that it
    makes. Backward has the gradients to each layer's input and weight and the depthwise convolution again.
    """
    batch, channels, height, width = s.shape
    elements, aggregated = math.prod(s.shape), 0
    for _ in range(s.recursive):
        aggregated += batch * channels * (height // 4 * 4) * (width // 4 * 4)
        height, width = height // 4, width // 4
    small = batch * channels * height * width
    forward = aggregated + (9 + channels) * small + 4 * elements
    backward = 2 * aggregated + (3 * 9 + 2 * channels) * small + 4 * elements
    return 2 * forward, 2 * backward


def shuffle_traffic(s: Setting) -> tuple[int, int]:
    """Count x or its gradient and the picture or its gradient, which are float32."""
    x = math.prod(s.shape) * s.dtype.itemsize
    picture = math.prod(OPERATORS["conv3x3_shuffle"].results(s)[0]) * 4
    return x + picture, 2 * x + picture


def chosen_experts(s: Setting, device: torch.device) -> dict:
    index = torch.full((s.shape[0], 1), CHOSEN, device=device)
    return {"expert_index": index, "expert_weight": torch.full_like(index, 0.75, dtype=torch.float32), "ranks": RANKS}


def experts(s: Setting) -> Shapes:
    into, rank = {}, sum(RANKS)
    for name in "ak":
        into |= {f"weight_{name}": (rank, s.channels), f"bias_{name}": (rank,)}
    return into | {"weight_out": (s.channels, rank), "bias_out": (EXPERTS, s.channels)}


def routed(s: Setting) -> Setting:
    return s._replace(taps=ROUTER_TAPS, activation="gelu")


def recursive_of(shape: tuple[int, ...]) -> int:
    return 1 if shape[1] == 48 or min(shape[2:]) < 16 else 2  # L's, or a map that is too small; else T's


def total(setting: Setting, *parts: str) -> tuple[int, int]:
    """Return the operations of several operators."""
    return tuple(map(sum, zip(*(OPERATORS[part].operations(setting) for part in parts), strict=True)))


OPERATORS = {
    "calibrate": Operator(
        calibrate_operations,
        lambda s: (
            layer("_agg", s.channels, 1, 4, 4)
            | layer("_dw", s.channels, 1, 3, 3)
            | layer("_pw", s.channels, s.channels)
        ),
        images=("k",),
        options=lambda s, device: {"recursive": s.recursive},
        quick=[
            Setting((1, 5, 17, 20), recursive=2),
            Setting((2, 4, 9, 14), torch.bfloat16, channels_last=True, recursive=1),
        ],
        cpu=[s._replace(recursive=recursive_of(s.shape)) for s in CPU],
        cuda=[s._replace(recursive=recursive_of(s.shape)) for s in CUDA],
    ),
    "conv3x3_shuffle": Operator(
        lambda s: s.multiply_adds(9 * PLANES * SCALE**2, 1, 2),
        lambda s: layer("", PLANES * SCALE**2, s.channels, 3, 3),
        results=lambda s: [(s.shape[0], PLANES, SCALE * s.shape[2], SCALE * s.shape[3])],
        options=lambda s, device: {"mean": torch.full((1, PLANES, 1, 1), 0.5, device=device), "scale": SCALE},
        traffic=shuffle_traffic,
    ),
    "gated_ffn": Operator(
        lambda s: s.multiply_adds(3 * s.channels + 9, 1, 3),
        lambda s: {
            **norm(s),
            **layer("_1", 2 * s.channels, s.channels),
            **layer("_gate", s.channels, 1, 3, 3),
            **layer("_2", s.channels, s.channels),
        },
    ),
    "low_rank_experts": Operator(
        lambda s: s.multiply_adds(RANKS[CHOSEN], 3, 8),  # three products; backward computes two of them again
        experts,
        images=("a", "k"),
        options=chosen_experts,
    ),
    "norm_conv3x3": Operator(
        lambda s: s.multiply_adds((9 + 2) * s.channels, 1, 3),
        lambda s: norm(s) | layer("", s.channels, s.channels, 3, 3) | layer("_pw", 2 * s.channels, s.channels),
        results=doubled,
        options=lambda s, device: {"activation": "gelu"},
    ),
    "norm_pointwise": Operator(
        lambda s: s.multiply_adds(2 * s.channels, 1, 3),
        lambda s: norm(s) | layer("", 2 * s.channels, s.channels),
        results=doubled,
        options=lambda s, device: {"activation": "gelu"},
    ),
    "pointwise": Operator(
        lambda s: s.multiply_adds(s.channels, 1, 2),
        lambda s: layer("", s.channels, s.channels),
        images=("x", "residual"),
    ),
    "router": Operator(
        lambda s: (math.prod(s.shape), 0),  # the pool's additions; backward only spreads one value per channel
        lambda s: {"weight": (EXPERTS, s.channels)},
        images=("a",),
        results=lambda s: [(s.shape[0], TOP_K)],
        options=lambda s, device: {"top_k": TOP_K},
        traffic=lambda s: (math.prod(s.shape) * s.dtype.itemsize,) * 2,  # backward writes a gradient, reads means alone
    ),
    "striped_conv": Operator(
        striped_operations,
        striped,
        options=lambda s, device: {"activation": s.activation},
        quick=[
            Setting((1, 5, 9, 14), taps=11),
            Setting((2, 4, 9, 14), channels_last=True, gated=True, **IN_MORE),
            Setting((2, 4, 9, 14), torch.bfloat16, **IN_SEE),
        ],
        cpu=[
            Setting(CPU_PHOTO, taps=11),
            Setting(CPU_PHOTO, torch.bfloat16, taps=11),
            Setting(CPU_PHOTO, **IN_SEE),
            Setting(CPU_PHOTO, channels_last=True, taps=11),
            Setting(CPU_PHOTO, **IN_MORE),
            Setting(PATCHES, taps=11),
        ],
        cuda=[
            *(Setting(*setting, **variant) for setting in ON_CUDA for variant in ({"taps": 11}, IN_SEE, IN_MORE)),
            Setting(PHOTO, channels_last=True, taps=11),
        ],
    ),
    "striped_conv_router": Operator(
        lambda s: total(routed(s), "striped_conv", "router"),
        lambda s: striped(routed(s)) | {"weight_router": (EXPERTS, s.channels)},
        results=lambda s: [s.shape, (s.shape[0], TOP_K)],
        options=lambda s, device: {"top_k": TOP_K, "activation": "gelu"},
    ),
    "rme_block": Operator(
        lambda s: total(
            s._replace(recursive=recursive_of(s.shape)),
            *("norm_conv3x3", "calibrate", "striped_conv_router", "low_rank_experts", "pointwise", "gated_ffn"),
        ),
        block="local_block",
        quick=QUICK_BLOCK,
    ),
    "sme_block": Operator(
        lambda s: total(s._replace(**IN_SEE), "norm_pointwise", "striped_conv", "pointwise", "gated_ffn"),
        block="global_block",
        quick=QUICK_BLOCK,
    ),
}

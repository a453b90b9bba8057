"""The operators' benchmark cases: sizes, inputs, and the operations and bytes that each one needs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from seemore_fast import ops, reference
from seemore_fast.benchmarks import harness

Shapes = dict[str, tuple[int, ...]]

# Sizes that matter on a GPU: T at 480x640, a batch of training patches, B and L at 720p
PHOTO, PATCHES, LARGE = (1, 36, 480, 640), (32, 36, 64, 64), (1, 48, 720, 1280)
ON_CUDA = [(shape, dtype) for shape in (PHOTO, PATCHES, LARGE) for dtype in (torch.float32, torch.bfloat16)]
ON_CUDA.append((PHOTO, torch.float16))
# On a CPU: what T upscales to 720p, and the patches
CPU_PHOTO = (1, 36, 360, 640)
ON_CPU = [(CPU_PHOTO, torch.float32), (CPU_PHOTO, torch.bfloat16), (PATCHES, torch.float32)]

RANKS, TOP_K, CHOSEN = (2, 4, 8), 1, 2  # T's ranks, and the expert chosen for every image: the largest
SCALE, PLANES = 2, 3  # of conv3x3_shuffle


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
    """Costs and settings of an operator, whose inputs follow from its declaration in `seemore_fast.ops`.

    `counted` are the operations (forward, backward), two for a multiply-add, or the names of the operators that are
    fused into this one. Elementwise work (norms, GELU, products) and what backward recomputes by choice are left out.
    Without `traffic` in bytes, every input and result counts once.
    """

    counted: Callable[[Setting], tuple[int, int]] | tuple[str, ...]
    sizes: Callable[[Setting], dict[str, int]] = lambda s: {}  # of the declaration's letters beyond B, C, H and W
    optional: tuple[str, ...] = ()  # names of optional tensors that are given
    options: Callable[[Setting, str | torch.device], dict] = lambda s, device: {}  # all other arguments
    traffic: Callable[[Setting], tuple[int, int]] | None = None
    place: dict | None = None  # fields of the settings of fused operators
    vector: int | None = 0  # multiply-adds outside matrices for each element of the first image; None: all
    erfs: Callable[[Setting], float] = lambda s: 0  # of GELU or its gradient, for each element of the first image
    kernel: str | None = None  # name of another operator whose kernels, too, serve this one
    block: str | None = None  # name in a residual group, for what is timed as a module
    quick: list[Setting] = QUICK
    cpu: list[Setting] = CPU
    cuda: list[Setting] = CUDA

    def operations(self, setting: Setting) -> tuple[int, int]:
        """Return the operations of forward and backward."""
        if callable(self.counted):
            return self.counted(setting)
        parts = (OPERATORS[name].operations(self.inside(setting)) for name in self.counted)
        return tuple(map(sum, zip(*parts, strict=True)))

    def inside(self, setting: Setting) -> Setting:
        """Return the setting of the operators that are fused into this one."""
        return setting._replace(recursive=recursive_of(setting.shape), **(self.place or {}))

    def cases(self) -> dict[str, dict[str, Setting]]:
        """Return the settings in every mode, by title, for quick trials, a CPU and a GPU."""
        found = {}
        for kind, settings in {"quick": self.quick, "cpu": self.cpu, "cuda": self.cuda}.items():
            in_modes = [setting._replace(mode=mode) for mode in harness.MODES for setting in settings]
            found[kind] = {setting.title(): setting for setting in in_modes}
        return found


def input_shapes(name: str, setting: Setting) -> Shapes:
    """Return the shapes of an operator's floating-point inputs."""
    operator = OPERATORS[name]
    if operator.block:
        return {"x": setting.shape}
    given = (*operator.optional, "gate") if setting.gated else operator.optional
    sizes = dict(zip("BCHW", setting.shape, strict=True)) | operator.sizes(setting) | {"": 1}
    options = operator.options(setting, "meta")
    declared = getattr(ops, name if hasattr(getattr(ops, name), "specs") else operator.kernel)
    specs = {n: spec for n, spec in declared.specs.items() if n not in options}
    return {
        n: tuple(factor * sizes[letter] for factor, letter in spec.sizes)
        for n, spec in specs.items()
        if n in given or not spec.is_optional
    }


def result_shapes(name: str, setting: Setting) -> list[tuple[int, ...]]:
    """Return the shapes of an operator's floating-point results."""
    if OPERATORS[name].block:
        return [setting.shape]
    shapes = input_shapes(name, setting)
    tensors = {n: torch.empty(shape, dtype=setting.dtype, device="meta") for n, shape in shapes.items()}
    results = getattr(reference, name)(**tensors, **OPERATORS[name].options(setting, "meta"))
    return [tuple(result.shape) for result in harness.as_list(results)]


def in_mode(counted: tuple[int, int], mode: str) -> int:
    """Return the count of a mode from those of forward and backward."""
    forward, backward = counted
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


# Costs and other arguments


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
    pixels = math.prod(s.shape) // s.channels
    x, picture = s.channels * pixels * s.dtype.itemsize, PLANES * SCALE**2 * pixels * 4
    return x + picture, 2 * x + picture


def chosen_experts(s: Setting, device: str | torch.device) -> dict:
    index = torch.full((s.shape[0], 1), CHOSEN, device=device)
    return {"expert_index": index, "expert_weight": torch.full_like(index, 0.75, dtype=torch.float32), "ranks": RANKS}


def recursive_of(shape: tuple[int, ...]) -> int:
    return 1 if shape[1] == 48 or min(shape[2:]) < 16 else 2  # L's, or a map that is too small; else T's


NORM = "norm_weight", "norm_bias"
OPERATORS = {
    "calibrate": Operator(
        calibrate_operations,
        options=lambda s, device: {"recursive": s.recursive},
        vector=None,
        erfs=lambda s: 1 / 16 + 1 / 256,
        quick=[
            Setting((1, 5, 17, 20), recursive=2),
            Setting((2, 4, 9, 14), torch.bfloat16, channels_last=True, recursive=1),
        ],
        cpu=[s._replace(recursive=recursive_of(s.shape)) for s in CPU],
        cuda=[s._replace(recursive=recursive_of(s.shape)) for s in CUDA],
    ),
    "conv3x3_shuffle": Operator(
        lambda s: s.multiply_adds(9 * PLANES * SCALE**2, 1, 2),
        sizes=lambda s: {"D": PLANES * SCALE**2},
        options=lambda s, device: {"mean": torch.full((1, PLANES, 1, 1), 0.5, device=device), "scale": SCALE},
        traffic=shuffle_traffic,
        kernel="norm_conv3x3",
    ),
    "gated_ffn": Operator(lambda s: s.multiply_adds(3 * s.channels + 9, 1, 3), vector=9, erfs=lambda s: 3),
    "low_rank_experts": Operator(
        lambda s: s.multiply_adds(RANKS[CHOSEN], 3, 8),  # three products; backward computes two of them again
        sizes=lambda s: {"R": sum(RANKS), "E": len(RANKS)},
        options=chosen_experts,
    ),
    "norm_conv3x3": Operator(
        lambda s: s.multiply_adds((9 + 2) * s.channels, 1, 3),
        sizes=lambda s: {"D": s.channels, "P": 2 * s.channels},
        optional=(*NORM, "weight_pw", "bias_pw"),
        options=lambda s, device: {"activation": "gelu"},
        erfs=lambda s: 1,
    ),
    "norm_pointwise": Operator(
        lambda s: s.multiply_adds(2 * s.channels, 1, 3),
        sizes=lambda s: {"D": 2 * s.channels},
        optional=NORM,
        options=lambda s, device: {"activation": "gelu"},
        erfs=lambda s: 2,
    ),
    "pointwise": Operator(
        lambda s: s.multiply_adds(s.channels, 1, 2),
        sizes=lambda s: {"D": s.channels},
        optional=("residual",),
        kernel="norm_pointwise",
    ),
    "router": Operator(
        lambda s: (math.prod(s.shape), 0),  # the pool's additions; backward only spreads one value per channel
        sizes=lambda s: {"E": len(RANKS)},
        options=lambda s, device: {"top_k": TOP_K},
        traffic=lambda s: (math.prod(s.shape) * s.dtype.itemsize,) * 2,  # backward writes a gradient, reads means alone
        vector=None,
    ),
    "striped_conv": Operator(
        striped_operations,
        sizes=lambda s: {"K": s.taps},
        options=lambda s, device: {"activation": s.activation},
        vector=None,
        erfs=lambda s: s.activation is not None,
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
        ("striped_conv", "router"),
        sizes=lambda s: {"K": IN_MORE["taps"], "E": len(RANKS)},
        options=lambda s, device: {"top_k": TOP_K, "activation": IN_MORE["activation"]},
        place=IN_MORE,
        vector=None,
    ),
    "rme_block": Operator(
        ("norm_conv3x3", "calibrate", "striped_conv_router", "low_rank_experts", "pointwise", "gated_ffn"),
        place=IN_MORE,
        block="local_block",
        quick=QUICK_BLOCK,
    ),
    "sme_block": Operator(
        ("norm_pointwise", "striped_conv", "pointwise", "gated_ffn"),
        place=IN_SEE,
        block="global_block",
        quick=QUICK_BLOCK,
    ),
}

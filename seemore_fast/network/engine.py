"""Engine: inference of the whole network as one operator of the CPU library or of the CUDA library.

`SeemoRe` takes it where `unsupported_reason` is None. The weights are packed at every call, so that they are never
stale, unless `SeemoRe.prepare` froze them.
"""

import math
from collections.abc import Iterator, Sequence
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from .. import memory
from .._torch_compat import has_forward_gradients, is_transformed
from ..backends import lookup_kernel, native, select_backend
from ..memory import check_memory, mapped_buffer
from ..ops.operator import define
from ..reference.config import expert_ranks
from .blocks import body_dtype
from .structure import Structure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # of dtypes, as csrc/params/views.h has them
GPU_MOST = {"taps": 11, "recursive": 3, "experts": 16, "ranks": 64}  # that the CUDA library's kernels are made for
IN_MEMORY = 6 * 2**30  # bytes that a streamed image takes before any of its features go through a file
MAX_BANDS = 2**31  # bytes of features of a file that all threads together hold at most, unless MIN_ROWS takes more
MIN_ROWS = 32  # of a band, which recomputes up to nine rows of its neighbours above and below


class MemoryPlan(NamedTuple):
    """Bytes of memory and disk that a run takes."""

    memory: int
    disk: int = 0
    resident: int = 0  # of the features in memory all the while, where others are on the disk
    rows: int = 0  # of a band, where there are features on the disk


class EngineConfig(NamedTuple):
    """The network as the library takes it: the fields of `NetworkConfig` in csrc/params/network.h, then the ranks."""

    scale: int
    in_channels: int
    channels: int
    groups: int
    taps: int
    recursive: int
    top_k: int
    is_shuffled: bool
    dtype: int  # of `NUMBERS`: operands of the dense and pointwise convolutions
    ranks: tuple[int, ...]  # of the experts

    @classmethod
    def of(cls, c: dict[str, Any]) -> "EngineConfig":
        """Return the configuration of a model with the arguments `c`, whose features are float32."""
        return cls(
            scale=c["scale"],
            in_channels=c["in_chans"],
            channels=c["embedding_dim"],
            groups=c["num_layers"],
            taps=c["global_kernel_size"],
            recursive=c["recursive"],
            top_k=c["topk"],
            is_shuffled=c["use_shuffle"],
            dtype=NUMBERS[torch.float32],
            ranks=tuple(expert_ranks(c["lr_space"], c["num_experts"])),
        )

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> "EngineConfig":
        """Return the configuration that an operator was called with."""
        ranks = len(cls._fields) - 1
        return cls._make([*numbers[:ranks], tuple(numbers[ranks:])])

    def numbers(self) -> list[int]:
        """Return the configuration as operators take it."""
        return [int(number) for number in (*self[:-1], *self.ranks)]


class Network(Protocol):
    """A `SeemoRe`, as far as its engine needs it."""

    config: dict[str, Any]
    training: bool
    scale: int
    img_range: float
    mean: Tensor
    conv_1: nn.Conv2d
    structure: Structure
    engine_config: "EngineConfig"

    @property
    def recompute(self) -> str: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def ordered_parameters(self) -> list[Tensor]: ...

    def are_frozen(self, weights: list[Tensor]) -> bool: ...

    def engine_weights(self, config: EngineConfig) -> tuple[list[Tensor], bool]: ...


def unsupported_reason(model: Network, x: Tensor) -> str | None:
    """Return None if `run` can compute model(x) now, otherwise the reason why not."""
    backend = select_backend("network", x, model.config["embedding_dim"])
    if backend == "reference":
        return (
            "the library for x's device is not there or not chosen, or has no kernels for it: x is not float32, "
            "bfloat16 or float16, or there are more than 64 channels on a GPU"
        )
    if model.training:
        return "the model is in training mode"
    weights = model.ordered_parameters()
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        return "gradients are wanted"
    if is_transformed() or has_forward_gradients():
        return "a transform of torch.func or forward-mode differentiation is at work"
    is_modified = False
    if not model.are_frozen(weights) or weights[0].device != x.device:
        dtype = weights[0].dtype
        if dtype not in DTYPES or any(w.dtype != dtype or w.device != x.device for w in weights):
            return "the parameters are not all of one dtype (float32, bfloat16 or float16) and on the device of x"
        is_modified = not model.structure.has_shapes(weights)
    if is_modified or not model.structure.has_modules():
        return "a module has a hook, or is not one that the model was built with"
    return None if backend == "cpu" else _gpu_reason(config_of(model, backend))


def _gpu_reason(config: EngineConfig) -> str | None:
    """Return None if the CUDA library has kernels for a configuration, otherwise the reason why not."""
    if config.dtype == NUMBERS[torch.float32]:
        return "features are float32: on a GPU the operators compute those"
    sizes = {
        "taps": config.taps,
        "recursive": config.recursive,
        "experts": len(config.ranks),
        "ranks": sum(config.ranks),
    }
    too_large = [
        f"{name} are {size}, at most {GPU_MOST[name]}" for name, size in sizes.items() if size > GPU_MOST[name]
    ]
    return ", ".join(too_large) or None


def config_of(model: Network, backend: str | None = None) -> EngineConfig:
    """Return the model's configuration for the operators of a backend's library, by default of that called now.

    On a CPU bfloat16 where the processor multiplies it; elsewhere it would be no faster than float32, which is exact.
    """
    dtype = body_dtype(model.conv_1.weight)
    if dtype != torch.float32 and (backend or select_backend("network", model.mean)) == "cpu":
        multiplies = dtype == torch.bfloat16 and native.instruction_set() == "avx512_bf16"
        dtype = torch.bfloat16 if multiplies else torch.float32
    return model.engine_config._replace(dtype=NUMBERS[dtype])


def plan_memory(
    model: Network, shape: Sequence[int], threads: int | None = None, itemsize: int = 4, streamed: bool = False
) -> MemoryPlan:
    """Return the memory of a run and its result, of `itemsize` bytes a value, for images of `shape` (B, C, H, W)."""
    return _plan(config_of(model), shape, threads, itemsize, streamed)


def run(model: Network, x: Tensor) -> Tensor:
    """Return model(x) in float32; x (B, C, H, W) of any floating type.

    Raises MemoryError, before anything is allocated, where what it takes is not there.
    """
    config = config_of(model)
    return torch.ops.seemore_fast.network(
        x, *model.engine_weights(config), model.mean, model.img_range, config.numbers()
    )


def run_out(model: Network, x: Tensor, y: Tensor, folder: Path | None = None, progress: Tensor | None = None) -> bool:
    """Write model(x) to y, both (B, C, H, W) of any strides, and both float32, uint8 or uint16.

    Integer images are scaled to [0, 1]; returns False if the network produced NaN or inf. With a `folder` the image is
    streamed in bounded memory, with the same result to the bit: beyond IN_MEMORY, or half of the free memory, features
    lie in a temporary file there, of which the memory holds a few bands. Raises OSError where the disk has no room.

    progress: two int64, which a thread may read meanwhile: work done and all work.
    """
    config = config_of(model)
    return _run(y, x, *model.engine_weights(config), model.mean, model.img_range, config, folder, progress)


def pack(parameters: list[Tensor], config: EngineConfig) -> Tensor:
    """Return the weights as the engine uses them, from the model's parameters in their order."""
    with torch.no_grad():
        flat = torch.cat([parameter.flatten() for parameter in parameters]).float()
    return lookup_kernel("network", flat, part="_pack")(flat, config.numbers())


def _run(
    y: Tensor,
    x: Tensor,
    weights: list[Tensor],
    is_packed: bool,
    mean: Tensor,
    img_range: float,
    config: EngineConfig,
    folder: Path | None = None,
    progress: Tensor | None = None,
) -> bool:
    """Write the result for x to y; small images are extended and their results cropped."""
    packed = weights[0] if is_packed else pack(weights, config)
    mean = mean.flatten().float().contiguous()
    shape = _extended(config, x.shape)
    if shape == x.shape:
        return _call(y, x, packed, mean, img_range, config, folder, progress)
    height, width = x.shape[2:]
    rows = torch.arange(shape[2], device=x.device).clamp(max=height - 1)
    columns = torch.arange(shape[3], device=x.device).clamp(max=width - 1)
    x = _as_known(x)[:, :, rows[:, None], columns].view(x.dtype)
    y_extended = y.new_empty(*shape[:2], shape[2] * config.scale, shape[3] * config.scale)
    is_finite = _call(y_extended, x, packed, mean, img_range, config, folder, progress)
    y.copy_(y_extended[:, :, : y.shape[2], : y.shape[3]])
    return is_finite


def _call(
    y: Tensor,
    x: Tensor,
    packed: Tensor,
    mean: Tensor,
    img_range: float,
    config: EngineConfig,
    folder: Path | None,
    progress: Tensor | None,
) -> bool:
    """Call the library, with the memory that it takes."""
    state, is_finite, rows, resident = None, None, 0, 0
    if _is_cpu(mean):
        if folder is not None:
            _, disk, resident, rows = _plan(config, x.shape, None, y.element_size(), streamed=True)
            state = mapped_buffer(resident + disk, folder, resident)[0] if disk else None
    elif y.dtype != torch.float32:
        is_finite = torch.ones(1, dtype=torch.int32, device=x.device)
    function = lookup_kernel("network", mean)
    result = function(y, x, packed, mean, img_range, config.numbers(), state, rows, resident, progress, is_finite)
    return result if is_finite is None else bool(is_finite)


def _is_cpu(like: Tensor) -> bool:
    """Return whether the CPU library computes the network for images on the device of `like`, in float32."""
    return select_backend("network", like) == "cpu"


def _as_known(x: Tensor) -> Tensor:
    """Return uint16 as int16: torch has few operators for the former."""
    return x.view(torch.int16) if x.dtype == torch.uint16 else x


def _extended(config: EngineConfig, shape: Sequence[int]) -> torch.Size:
    """Return the shape that the library works on: at least 4^recursive pixels a side."""
    least = 4**config.recursive
    return torch.Size((*shape[:2], max(shape[2], least), max(shape[3], least)))


def _plan(config: EngineConfig, shape: Sequence[int], threads: int | None, itemsize: int, streamed: bool) -> MemoryPlan:
    threads = threads or torch.get_num_threads()
    shape = _extended(config, shape)
    result = itemsize * math.prod(shape) * config.scale**2
    whole = sum(_workspace(config, shape, threads, band_rows=0)) + result
    if not streamed:
        return MemoryPlan(whole)
    available = memory.available_memory()
    budget = IN_MEMORY if available is None else min(IN_MEMORY, available // 2)
    if whole <= budget:
        return MemoryPlan(whole)
    band_rows = _band_rows(config, shape, threads)
    state, rest = _workspace(config, shape, threads, band_rows)
    at_once = band_rows + 2 * (4 + config.taps // 2)  # a band, and copies of its neighbours' rows
    least = min(state, threads * at_once * _row_bytes(config, shape)) + rest + result
    resident = max(0, min(budget - least, state - 1)) // PAGESIZE * PAGESIZE if memory.CAN_STAY_RESIDENT else 0
    return MemoryPlan(least + resident, state - resident, resident, band_rows)


def _workspace(config: EngineConfig, shape: Sequence[int], threads: int, band_rows: int) -> tuple[int, int]:
    """Return the bytes of the features of whole images, and those of the rest of the workspace."""
    batch, _, height, width = shape
    rows, columns = min(height, 2**20), min(width, 2**20)  # more, in proportion: bytes may be too many for 64 bits
    state, rest = torch.ops.seemore_cpu.network_memory(config.numbers(), batch, rows, columns, threads, band_rows)
    return tuple(part * height * width // (rows * columns) for part in (state, rest))


def _row_bytes(config: EngineConfig, shape: Sequence[int]) -> int:
    one = torch.Size((1, shape[1], *shape[2:]))
    return -(-_workspace(config, one, 1, 0)[0] // shape[2])


def _band_rows(config: EngineConfig, shape: Sequence[int], threads: int) -> int:
    """Return the rows of a band of an image whose features lie in a file."""
    available = memory.available_memory()
    budget = MAX_BANDS if available is None else min(MAX_BANDS, available // 4)
    return max(MIN_ROWS, budget // (threads * _row_bytes(config, shape)))


def _forward(
    x: Tensor, weights: list[Tensor], is_packed: bool, mean: Tensor, img_range: float, numbers: list[int]
) -> Tensor:
    config = EngineConfig.from_numbers(numbers)
    scale = config.scale
    batch, channels, height, width = x.shape
    shape = _extended(config, x.shape)
    if x.device.type == "cpu" and _is_cpu(mean):
        is_copied = x.dtype != torch.float32 or shape != x.shape
        needed = _plan(config, x.shape, None, itemsize=4, streamed=False).memory + is_copied * 4 * math.prod(shape)
        check_memory(needed, f"x of shape {tuple(x.shape)} upscaled {scale}x")
    y = x.new_empty(batch, channels, height * scale, width * scale, dtype=torch.float32)
    _run(y, x.float(), weights, is_packed, mean, img_range, config)
    return y


def _forward_fake(
    x: Tensor, weights: list[Tensor], is_packed: bool, mean: Tensor, img_range: float, numbers: list[int]
) -> Tensor:
    config = EngineConfig.from_numbers(numbers)
    batch, channels, height, width = x.shape
    return x.new_empty(batch, channels, height * config.scale, width * config.scale, dtype=torch.float32)


define(
    "network",
    "(Tensor x, Tensor[] weights, bool is_packed, Tensor mean, float img_range, int[] config) -> Tensor",
    _forward,
    _forward_fake,
)

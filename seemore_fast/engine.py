"""The CPU library's fused inference: the whole network as one operator.

`SeemoRe` takes it by itself where `why_not` finds nothing against it. The weights are packed at every call, so that
they are never stale, unless `SeemoRe.prepare` froze them.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native
from .backends import choose
from .memory import check_memory
from .ops.library import define
from .reference.model import body_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(model, x: Tensor) -> str | None:
    """Return None if `run` can compute model(x) now, else the reason why not."""
    if choose("network", x) != "cpu":
        return "the CPU library is not there or not chosen, or x is not on the CPU or not float32, bfloat16 or float16"
    if model.training:
        return "the model is in training mode"
    weights = model.built_weights()
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        return "gradients are wanted"
    if torch._C._functorch.get_dynamic_layer_stack_depth() or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode differentiation is at work"
    dtype = weights[0].dtype
    if dtype not in DTYPES or any(w.dtype != dtype or w.device != x.device for w in weights):
        return "the parameters are not all of one dtype (float32, bfloat16 or float16) and on the CPU"
    if not model.is_untouched():
        return "a module has a hook, or is not one that the model was built with"
    return None


def config_of(model) -> list[int]:
    """Return what the library's operators want to know of the model, as it would be called now.

    bfloat16 where the processor multiplies it; elsewhere it would be no faster than float32, which is exact.
    """
    c = model.config
    is_narrow = body_dtype(model.conv_1.weight) == torch.bfloat16
    in_bfloat16 = is_narrow and native.instruction_set() == "avx512_bf16"
    names = ("scale", "in_chans", "embedding_dim", "num_layers", "global_kernel_size", "recursive", "topk")
    ranks = model.body[0].local_block.block.moe_layer.ranks
    return [*(c[name] for name in names), int(c["use_shuffle"]), int(in_bfloat16), *ranks]


def memory_needed(model, shape: torch.Size, threads: int | None = None, itemsize: int = 4) -> int:
    """Return the bytes of `run`'s workspace and a result of `itemsize` a value, for images of `shape` (B, C, H, W)."""
    return _memory(config_of(model), shape, threads, itemsize)


def run(model, x: Tensor) -> Tensor:
    """Return model(x) in float32; x (B, C, H, W) of any floating type.

    Raises MemoryError, before anything is allocated, where what it takes is not there.
    """
    config = config_of(model)
    return torch.ops.seemore_fast.network(x, *model.weights_now(config), model.mean, model.img_range, config)


def run_integers(model, x: Tensor, y: Tensor) -> bool:
    """Write model(x) to y, both (B, C, H, W) of any strides, both uint8 or both uint16, whose largest stands for 1.

    Results are bounded to [0, 1] and rounded to the nearest. Return whether all of them were numbers before.
    """
    config = config_of(model)
    return _run(y, x, *model.weights_now(config), model.mean, model.img_range, config)


def pack(parameters: list[Tensor], config: list[int]) -> Tensor:
    """Return the weights as the engine uses them, from the model's parameters in their order."""
    with torch.no_grad():
        flat = torch.cat([parameter.flatten() for parameter in parameters]).float()
    return torch.ops.seemore_cpu.network_pack(flat, config)


def _run(y: Tensor, x: Tensor, weights: list[Tensor], is_packed: bool, mean, img_range, config) -> bool:
    """Write the result for x to y; images that are too small are extended, and theirs cropped."""
    packed = weights[0] if is_packed else pack(weights, config)
    mean = mean.flatten().float().contiguous()
    shape = _extended(config, x.shape)
    if shape == x.shape:
        return torch.ops.seemore_cpu.network(y, x, packed, mean, img_range, config)
    height, width = x.shape[2:]
    rows, columns = torch.arange(shape[2]).clamp(max=height - 1), torch.arange(shape[3]).clamp(max=width - 1)
    x = _as_known(x)[:, :, rows[:, None], columns].view(x.dtype)
    y_extended = y.new_empty(*shape[:2], shape[2] * config[0], shape[3] * config[0])
    are_numbers = torch.ops.seemore_cpu.network(y_extended, x, packed, mean, img_range, config)
    y.copy_(y_extended[:, :, : y.shape[2], : y.shape[3]])
    return are_numbers


def _as_known(x: Tensor) -> Tensor:
    """Return uint16 as int16: torch hardly knows the former."""
    return x.view(torch.int16) if x.dtype == torch.uint16 else x


def _extended(config: list[int], shape: torch.Size) -> torch.Size:
    """Return the shape that the library works on: at least 4^recursive pixels a side."""
    least = 4 ** config[5]
    return torch.Size((*shape[:2], max(shape[2], least), max(shape[3], least)))


def _memory(config: list[int], shape: torch.Size, threads: int | None, itemsize: int) -> int:
    batch, channels, height, width = _extended(config, shape)
    rows, columns = min(height, 2**20), min(width, 2**20)  # more, in proportion: bytes may be too many for 64 bits
    workspace = torch.ops.seemore_cpu.network_memory(config, batch, rows, columns, threads or torch.get_num_threads())
    pixels = height * width
    return workspace * pixels // (rows * columns) + itemsize * batch * channels * pixels * config[0] ** 2


def _forward(x, weights, is_packed, mean, img_range, config):
    scale = config[0]
    batch, channels, height, width = x.shape
    shape = _extended(config, x.shape)
    is_copied = x.dtype != torch.float32 or shape != x.shape
    needed = _memory(config, x.shape, None, itemsize=4) + is_copied * 4 * math.prod(shape)
    check_memory(needed, f"x of shape {tuple(x.shape)}, enlarged {scale} times,")
    y = x.new_empty(batch, channels, height * scale, width * scale, dtype=torch.float32)
    _run(y, x.float(), weights, is_packed, mean, img_range, config)
    return y


def _forward_fake(x, weights, is_packed, mean, img_range, config):
    batch, channels, height, width = x.shape
    return x.new_empty(batch, channels, height * config[0], width * config[0], dtype=torch.float32)


define(
    "network",
    "(Tensor x, Tensor[] weights, bool is_packed, Tensor mean, float img_range, int[] config) -> Tensor",
    _forward,
    _forward_fake,
)

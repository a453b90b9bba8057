"""The CPU library's fused inference: the whole network as one operator.

`SeemoRe` takes it by itself where `why_not` finds nothing against it. The weights are packed at every call, so that
they are never stale, unless `SeemoRe.prepare` froze them.
"""

import torch
from torch import Tensor

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
    parameters = tuple(model.parameters())
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        return "gradients are wanted"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    dtype = parameters[0].dtype
    if dtype not in DTYPES or any(p.dtype != dtype or p.device != x.device for p in parameters):
        return "the parameters are not all of one dtype (float32, bfloat16 or float16) and on the CPU"
    if not model.is_untouched():
        return "a module has a hook, or is not one that the model was built with"
    return None


def config_of(model, dtype: torch.dtype) -> list[int]:
    """Return what the library's operators want to know, for features in `dtype`.

    bfloat16 where the processor multiplies it; elsewhere it would be no faster than float32, which is exact.
    """
    c = model.config
    in_bfloat16 = dtype == torch.bfloat16 and native.instruction_set() == "avx512_bf16"
    names = ("scale", "in_chans", "embedding_dim", "num_layers", "global_kernel_size", "recursive", "topk")
    ranks = model.body[0].local_block.block.moe_layer.ranks
    return [*(c[name] for name in names), int(c["use_shuffle"]), int(in_bfloat16), *ranks]


def memory_needed(model, shape: torch.Size, threads: int | None = None) -> int:
    """Return the bytes that `run` takes for its workspace and a float32 result, images of `shape` (B, C, H, W)."""
    batch, channels, height, width = shape
    config = config_of(model, body_dtype(model.conv_1.weight))
    workspace = torch.ops.seemore_cpu.network_memory(config, batch, height, width, threads or torch.get_num_threads())
    return workspace + 4 * batch * channels * height * width * model.scale**2


def run(model, x: Tensor) -> Tensor:
    """Return model(x) in float32; x (B, C, H, W) of any floating type, at least 4^recursive pixels a side."""
    config = config_of(model, body_dtype(model.conv_1.weight))
    frozen = model.frozen_weights(config)
    weights = list(model.parameters()) if frozen is None else [frozen]
    return torch.ops.seemore_fast.network(x.float(), weights, frozen is not None, model.mean, model.img_range, config)


def run_integers(model, x: Tensor, y: Tensor) -> bool:
    """Write model(x) to y, both (B, C, H, W) of any strides, both uint8 or both uint16, whose largest stands for 1.

    Results are bounded to [0, 1] and rounded to the nearest. Return whether all of them were numbers before.
    """
    config = config_of(model, body_dtype(model.conv_1.weight))
    frozen = model.frozen_weights(config)
    weights = pack(list(model.parameters()), config) if frozen is None else frozen
    return torch.ops.seemore_cpu.network(y, x, weights, as_mean(model.mean), model.img_range, config)


def pack(parameters: list[Tensor], config: list[int]) -> Tensor:
    """Return the weights as the engine uses them, from the model's parameters in their order."""
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters]).float()
    return torch.ops.seemore_cpu.network_pack(flat, config)


def as_mean(mean: Tensor) -> Tensor:
    return mean.flatten().float().contiguous()


def _forward(x, weights, is_packed, mean, img_range, config):
    scale = config[0]
    batch, channels, height, width = x.shape
    what = f"x of shape {tuple(x.shape)}, enlarged {scale} times,"
    y_bytes = 4 * x.numel() * scale**2
    threads = torch.get_num_threads()
    check_memory(torch.ops.seemore_cpu.network_memory(config, batch, height, width, threads) + y_bytes, what)
    y = x.new_empty(batch, channels, height * scale, width * scale)
    packed = weights[0] if is_packed else pack(weights, config)
    torch.ops.seemore_cpu.network(y, x, packed, as_mean(mean), img_range, config)
    return y


def _forward_fake(x, weights, is_packed, mean, img_range, config):
    batch, channels, height, width = x.shape
    return x.new_empty(batch, channels, height * config[0], width * config[0])


define(
    "network",
    "(Tensor x, Tensor[] weights, bool is_packed, Tensor mean, float img_range, int[] config) -> Tensor",
    _forward,
    _forward_fake,
)

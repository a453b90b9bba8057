"""Network, optimizer and step of a run."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError
from ..network.model import SeemoRe
from .capture import on_side_stream
from .config import Config, Optimizer
from .distributed import World
from .graphed_step import TrainingStep, graphs_for
from .logging import has_tensorboard
from .losses import pixel_loss

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_environment(config: Config, world: World):
    """Raise ConfigError if the configuration does not fit the processes, the device or the installation."""
    if config.log.tensorboard and not has_tensorboard():
        raise ConfigError("log.tensorboard is true, but it is not installed: pip install 'seemore-fast[train]'")
    if config.data.batch % (world.size * config.accumulate):
        raise ConfigError(
            f"data.batch is {config.data.batch}, expected a multiple of {world.size * config.accumulate}: "
            f"{world.size} processes times accumulate = {config.accumulate}"
        )
    if config.precision == "fp16" and world.device.type != "cuda":
        raise ConfigError("precision is fp16, expected fp32 or bf16 without a GPU")


def build_model(config: Config, device: torch.device) -> SeemoRe:
    """Return the network in training mode; raise ConfigError for arguments that it refuses."""
    try:
        model = SeemoRe(**config.model.arguments())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None
    if model.in_chans != 3:
        raise ConfigError(f"model.in_chans is {model.in_chans}, expected 3: images are read as RGB")
    if config.data.patch < model.min_size:
        raise ConfigError(
            f"data.patch is {config.data.patch}, expected at least {model.min_size}, the smallest image that "
            "the network takes without padding"
        )
    model.recompute = config.recompute
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return model.to(device, dtype).train()


def build_optimizer(config: Optimizer, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def build_step(
    config: Config,
    world: World,
    model: SeemoRe,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    report: Callable[[str], None],
) -> TrainingStep:
    """Return the step on a batch, uint8: on a GPU in CUDA graphs, unless `graph` is false."""
    device, network = world.device, model
    graphs = graphs_for(device) if config.graph else None
    if world.size > 1:
        with contextlib.nullcontext() if graphs is None else on_side_stream(device):
            network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    dtype, cast = next(model.parameters()).dtype, AUTOCAST.get(config.precision)
    weights = config.loss.model_dump()

    def gradients(network: nn.Module, lr: Tensor, hr: Tensor) -> Tensor:
        """Compute the gradients in `accumulate` parts; return the loss."""
        total = torch.zeros((), dtype=dtype, device=device)
        parts = list(zip(lr.chunk(config.accumulate), hr.chunk(config.accumulate), strict=True))
        for i, (x, target) in enumerate(parts):
            x, target = (images.to(device, non_blocking=True).to(dtype) / 255 for images in (x, target))
            is_last = i == len(parts) - 1
            is_ddp = isinstance(network, DistributedDataParallel)
            with network.no_sync() if is_ddp and not is_last else contextlib.nullcontext():
                with torch.autocast(device.type, cast, enabled=cast is not None):
                    y = network(x)
                loss = pixel_loss(y, target, **weights) / len(parts)
                scaler.scale(loss).backward()
            total += loss.detach()
        return total

    return TrainingStep(network, gradients, optimizer, scaler, config.optimizer.clip, graphs, report)

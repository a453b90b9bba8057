"""Network and optimizer of a run."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..network.model import SeemoRe
from .config import Config, Optimizer
from .distributed import World
from .logging import has_tensorboard


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

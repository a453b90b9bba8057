"""Network and optimizer of a run, as its configuration tells."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..network.model import SeemoRe
from .config import Config, ConfigError, Optimizer
from .group import Group
from .records import check_tensorboard


def check_combination(config: Config, group: Group):
    """Raise ConfigError for what cannot be together, or not here."""
    world = group.world
    check_tensorboard(config.log.tensorboard)
    if config.data.batch % (world * config.accumulate):
        raise ConfigError(
            f"data.batch is {config.data.batch}, expected a multiple of {world * config.accumulate}: "
            f"{world} processes times accumulate = {config.accumulate}"
        )
    if config.precision == "fp16" and group.device.type != "cuda":
        raise ConfigError("precision is fp16, expected fp32 or bf16 where there is no GPU")


def build_model(config: Config, device: torch.device) -> SeemoRe:
    """Return the network of a run, in training mode; ConfigError where there is none of that kind."""
    try:
        model = SeemoRe(**config.model.arguments())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None
    if model.in_chans != 3:
        raise ConfigError(f"model.in_chans is {model.in_chans}, expected 3: images are read as RGB")
    if config.data.patch < model.min_size:
        raise ConfigError(
            f"data.patch is {config.data.patch}, expected at least {model.min_size}, the smallest image that "
            "the network takes as it is"
        )
    model.recompute = config.recompute
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return model.to(device, dtype).train()


def build_optimizer(told: Optimizer, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[told.name]
    return kind(parameters, told.lr, betas=told.betas, weight_decay=told.weight_decay, fused=True)

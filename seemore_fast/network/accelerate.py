"""Conversion of SeemoRe modules of other origins into this package's."""

from typing import Any

import torch
import torch.nn as nn

from ..errors import CheckpointError
from .checkpoint import check_keys, detect_config
from .model import SeemoRe


def accelerate(module: nn.Module) -> SeemoRe:
    """Return a SeemoRe of this package that shares the Parameters of `module`.

    `module` is a SeemoRe of any origin that has the published structure: the published repository, the PyPI package
    `seemore`, spandrel (the module or its descriptor), or this package. An optimizer that holds the parameters of
    `module` goes on training them. Device, dtype, training mode and frozen parameters stay as they are; hooks are not
    taken along.

    Raises TypeError for what is no module and CheckpointError for one of another structure.
    """
    module = _unwrap(module)
    parameters = dict(module.named_parameters())
    with torch.device("meta"):
        model = SeemoRe(**_read_config(module, parameters))
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_keys(expected, parameters)
    for name, parameter in parameters.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
    device, dtype = parameters["conv_1.weight"].device, parameters["conv_1.weight"].dtype
    mean = getattr(module, "mean", None)  # the published module always has one for RGB
    if isinstance(mean, torch.Tensor) and mean.numel() == model.in_chans:
        mean = mean.detach().clone().view(1, -1, 1, 1)
    else:
        mean = SeemoRe.mean_of(model.in_chans)
    model.mean = mean.to(device, dtype)
    modes = {name: child.training for name, child in module.named_modules()}
    for name, child in model.named_modules():
        child.training = modes.get(name, module.training)
    return model


def _unwrap(module: Any) -> nn.Module:
    inner = getattr(module, "model", None)  # spandrel's descriptor
    if not isinstance(module, nn.Module) and isinstance(inner, nn.Module):
        module = inner
    for wrapper in ("_orig_mod", "module"):  # torch.compile; DataParallel and DDP
        module = getattr(module, wrapper, module)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}, expected a SeemoRe module or spandrel's descriptor of one"
        )
    return module


def _read_config(module: Any, parameters: dict) -> dict:
    """Return the arguments of SeemoRe, from the shapes and the attributes of the published modules."""
    try:
        block = module.body[0].local_block.block
        moe = block.moe_layer
        top_k = moe.gate.top_k if hasattr(moe.gate, "top_k") else moe.num_expert  # ours, or the published name
        attributes = {
            "use_shuffle": block.use_shuffle,
            "recursive": block.recursive,
            "topk": top_k,
            "img_range": module.img_range,
        }
    except (AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{type(module).__name__} does not have the structure of the published SeemoRe: {error}"
        ) from None
    return detect_config(parameters, attributes)

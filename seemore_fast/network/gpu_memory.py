"""Memory that the network takes on a GPU."""

import math
from collections.abc import Callable, Sequence

import torch

from ..errors import first_line
from . import engine
from .engine import Network


def gpu_memory_needed(model: Network, shape: Sequence[int], training: bool = False) -> int:
    """Return about how many bytes a call of SeemoRe takes on a GPU for images of `shape` (B, C, H, W).

    Of inference by operators, the most is four images of features in a block, one in float32 between its stripes and
    the small maps of `calibrate`, float32 for 35 of 256 pixels, or f in float32 and the picture at the end. By the
    engine, in 16 bits, it is three images of padded features, the experts' ranks, a map, and the picture. Training
    keeps 11 images of features of each group besides, 8 without SEE's inside, 2 for blocks alone.
    """
    batch, colours, height, width = shape
    channels = model.config["embedding_dim"]
    itemsize = model.conv_1.weight.element_size()
    if torch.is_autocast_enabled("cuda"):
        itemsize = min(itemsize, torch.get_autocast_dtype("cuda").itemsize)
    kept = {"none": 11, "auto": 8, "block": 2}[model.recompute] * model.config["num_layers"] if training else 0
    picture = 4 * colours * model.scale**2
    inside, end = channels * (4 * itemsize + 4 + 4 * 35 / 256), 4 * channels + picture
    if itemsize == 2 and not training and engine.unsupported_reason(model, model.mean) is None:
        ranks = 16 * math.ceil(sum(model.engine_config.ranks) / 16)
        end = max(channels, 40) * (3 * itemsize + 4 / 16) + ranks * itemsize + picture
    return round(batch * height * width * (max(inside, end) + kept * channels * itemsize + 4 * colours))


def with_oom_hint(function: Callable[[torch.Tensor], torch.Tensor], model: Network, x: torch.Tensor) -> torch.Tensor:
    """Return function(x); where a GPU's memory does not suffice, report the need and a remedy.

    Raises torch.OutOfMemoryError, after what was in use has been given back.
    """
    try:
        return function(x)
    except torch.OutOfMemoryError as error:
        reason = first_line(error)
    torch.cuda.empty_cache()  # not in the handler: the error holds on to what was in use
    training = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    needed = gpu_memory_needed(model, x.shape, training)
    remedy = 'model.recompute = "block", a smaller batch or patch' if training else "a smaller image or batch"
    raise torch.OutOfMemoryError(
        f"x of shape {tuple(x.shape)} needs about {needed / 2**30:,.1f} GiB on {x.device}, which are not free: "
        f"take {remedy}, or bfloat16 (model.bfloat16() or autocast) instead of float32. {reason}"
    )

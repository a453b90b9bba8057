"""The router of MoRE: one decision per image.

In the paper: "Rank Modulating Expert".
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager:
    """Return a context in which autocast is off; where it is off already, none, which traces to nothing."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def router(a: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` most probable experts of each image, most probable first.

        p = softmax(weight @ mean_HW(a));   the top_k largest entries of p, not renormalised

    | tensor          | shape        | dtype                           |
    |-----------------|--------------|---------------------------------|
    | a               | (B, C, H, W) | any floating type               |
    | weight          | (E, C)       | any floating type               |
    | returns indices | (B, top_k)   | int64                           |
    | returns weights | (B, top_k)   | float32 (float64 for float64 a) |

    Computed in float32 from the pool on, also under autocast, where the published code rounds the probabilities
    to the input's type: nearly uniform routers would tie or flip there. Ties are broken as torch.topk does, which
    differs from device to device; kernels take the lower index first. NaN is the largest of all.
    """
    return route(a.mean(dim=(2, 3), dtype=torch.promote_types(a.dtype, torch.float32)), weight, top_k)


def route(mean: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Do what `router` does after the pool: `mean` (B, C) is the mean over the pixels, of any floating type."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    with without_autocast(mean.device.type):
        return choose_experts(F.linear(mean.to(wide), weight.to(wide)), top_k)


def choose_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the indices and the probabilities of the `top_k` largest of logits (B, E), in at least float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    probability, index = logits.softmax(dim=1, dtype=wide).topk(top_k, dim=1)
    return index, probability

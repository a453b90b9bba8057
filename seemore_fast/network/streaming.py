"""Streaming of images whose features do not fit on the device: group by group, a band of rows at a time.

Between two global pools everything is local. So one pass over the image finishes a group and begins the next one. The
features of all pixels wait in the host's memory or in a file; the bands go to the device and back. A pass leaves two
small tensors of the whole image to the next one: the mean that the router pools, and the map of `calibrate`. The result
is that of the whole image except for the order of summation of those means.

Engines stream by themselves, the CPU's in place (`engine.run_out`), the GPU's by `engine_streaming`; this serves
everything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..reference.calibrate import aggregate, mix
from .blocks import body_dtype
from .fused import RMEParams, SMEParams, modulate, sme, widen
from .model import SeemoRe

END = 2  # halo rows of the convolutions before a pool, and of those before the pixels


@dataclass
class RoutingState:
    """Small tensors of a whole image.

    experts     index and weight of each group so far
    map         calibrate's for the next group, (1, C, H / 4^recursive, W / 4^recursive)
    """

    experts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    map: Tensor | None = None


class StagedNetwork:
    """Parts of a SeemoRe between its pools, for images (1, C, H, W) that may be parts of a larger one.

    Raises ValueError where the model has hooks, replaced modules or is in training: these parts would not compute it.
    """

    def __init__(self, model: SeemoRe):
        if model.training or not model.is_unmodified():
            raise ValueError(
                "the model is in training mode or was modified, expected one without hooks: call model.eval()"
            )
        self.model = model
        self.ends = model.ends()
        self.halo = 4 + model.config["global_kernel_size"] // 2  # rows that a group reads above and below
        self.dtype = body_dtype(model.conv_1.weight)
        self.params: list[tuple[RMEParams, SMEParams]] = [
            (group.local_block.params(), group.global_block.params()) for group in model.body
        ]

    def first(self, x: Tensor) -> Tensor:
        """Return conv_1 of an image in [0, 1], float32."""
        return self.model.first((x - self.model.mean) * self.model.img_range, self.ends)

    def widen(self, group: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and k, the first half of a group's MoE block. Reads a halo of two pixels."""
        rme, _ = self.params[group]
        a, k = widen(x, rme)
        return ops.striped_conv(a, *rme.stripes, activation="gelu"), k

    def aggregate(self, group: int, k: Tensor) -> Tensor:
        """Return k at 1 / 4^recursive of its size; a part must begin at a multiple of that."""
        weight, bias = (t.to(k.dtype) for t in self.params[group][0].calibrate[:2])
        return aggregate(k, weight, bias, self.model.config["recursive"])

    def route(self, group: int, mean: Tensor, gathered: Tensor, state: RoutingState):
        """Choose the group's experts from the mean of a, (1, C), and compute the map of what was aggregated of k."""
        rme, _ = self.params[group]
        state.map = mix(gathered, *(t.to(gathered.dtype) for t in rme.calibrate[2:]))
        state.experts.append(ops.router(mean.float()[:, :, None, None], *rme.router, self.model.config["topk"]))

    def finish(self, group: int, x: Tensor, a: Tensor, k: Tensor, experts: tuple[Tensor, Tensor]) -> Tensor:
        """Return the rest of a group, from its calibrated k. Reads a halo of `halo` - 2 pixels."""
        rme, of_sme = self.params[group]
        ranks = self.model.body[group].local_block.block.moe_layer.ranks
        return sme(ops.gated_ffn(modulate(x, a, k, *experts, rme, ranks), *rme.ffn), of_sme)

    def last(self, y: Tensor, f: Tensor) -> Tensor:
        """Return the image of the last features and of conv_1's. Reads a halo of two pixels."""
        return self.model.last(ops.norm_conv3x3(y, *self.ends.features) + f, self.ends)


def spread(small: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Return the rows [top, bottom) of `small` stretched to `size`, as F.interpolate(..., "bilinear") does it."""
    at = (torch.arange(top, bottom, device=small.device) + 0.5) * (small.shape[2] / size[0]) - 0.5
    at = at.clamp(min=0)
    above = at.long().clamp(max=small.shape[2] - 1)
    below = (above + 1).clamp(max=small.shape[2] - 1)
    share = (at - above).to(small.dtype)[:, None]
    rows = small[:, :, above] * (1 - share) + small[:, :, below] * share
    return F.interpolate(rows, size=(bottom - top, size[1]), mode="bilinear", align_corners=False)


def stream(
    model: SeemoRe,
    features: Tensor,
    read: Callable[[int, int], Tensor],
    write: Callable[[int, Tensor], None],
    rows: int,
    release: Callable[[int, int], None] = lambda top, bottom: None,
    progress: Callable[[float], None] = lambda share: None,
):
    """Compute model(image) in bands of `rows` rows, a multiple of 4^recursive.

    features    (H, C, W) in the type that the body computes in, where they wait; overwritten
    read        gives rows [top, bottom) of the image, (1, in_chans, bottom - top, W), float32 on the model's device
    write       takes the result's rows from a row on, (1, in_chans, rows, scale * W)
    release     is called with the rows [top, bottom) of `features` that are not needed for a while
    progress    is called with the share of the work that is done
    """
    network, state = StagedNetwork(model), RoutingState()
    height, _, width = features.shape
    groups = len(network.params)
    for group in range(groups + 1):
        total, gathered, above = torch.zeros((), dtype=torch.float64), [], None
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first, last = max(top - END, 0), min(bottom + END, height)
            if group == 0:
                x = _rows_of(network.first, read, first, last, height).to(network.dtype)
            else:
                x, above = _finished(network, state, features, above, (first, top, bottom, last))
            inner = slice(top - first, bottom - first)
            if group < groups:
                features[top:bottom].copy_(x[0, :, inner].permute(1, 0, 2))
                release(top, bottom)
                a, k = network.widen(group, x)
                total = total + a[:, :, inner].sum((2, 3), dtype=torch.float64)
                if bottom - top >= model.min_size:  # else the end of an image, too low for a row of the map
                    gathered.append(network.aggregate(group, k[:, :, inner].contiguous()))
            else:
                f = _rows_of(network.first, read, first, last, height)
                scale = model.scale
                write(top * scale, network.last(x, f)[:, :, inner.start * scale : inner.stop * scale])
            progress((group + bottom / height) / (groups + 1))
        if group < groups:
            network.route(group, total / (height * width), torch.cat(gathered, dim=2), state)


def _rows_of(first: Callable, read: Callable, top: int, bottom: int, height: int) -> Tensor:
    """Return conv_1's rows [top, bottom)."""
    begin, end = max(top - 1, 0), min(bottom + 1, height)
    return first(read(begin, end))[:, :, top - begin : bottom - begin]


def _finished(
    network: StagedNetwork, state: RoutingState, features: Tensor, above: Tensor | None, edges: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the last group's result for the rows [first, last), and what of `features` the next band looks back at.

    `above` are rows of `features` that end at `top`, as they were before the band before overwrote them.
    """
    first, top, bottom, last = edges
    group = len(state.experts) - 1
    height, _, width = features.shape
    begin, end = max(first - network.halo, 0), min(last + network.halo, height)
    device = network.model.mean.device
    x = features[top:end].to(device)
    if above is not None:
        x = torch.cat([above[begin - top :], x])
    kept = x[: bottom - begin][-(END + network.halo) :].clone()
    x = x.permute(1, 0, 2)[None].contiguous()
    a, k = network.widen(group, x)
    assert state.map is not None  # since the group was routed
    k = k + spread(state.map, (height, width), begin, end)
    x = network.finish(group, x, a, k, state.experts[group])
    return x[:, :, first - begin : last - begin], kept

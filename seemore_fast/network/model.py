"""SeemoRe, the drop-in network: tree, keys and arguments are the published ones, the operators are fused."""

import json
from functools import partial, wraps
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from .._torch_compat import has_forward_gradients, is_observed, is_transformed
from ..backends import select_backend
from ..backends.planes import new_image, new_packed
from ..ops.norm_conv3x3 import norm_conv3x3_into
from ..reference.router import without_autocast
from . import engine, node
from .blocks import Block, Fused, ResGroup, body_dtype, frozen, parameters_of
from .checkpointing import CHOICES
from .gpu_memory import with_oom_hint
from .graphs import Graphs
from .modules import ModuleList, MoEBlock, Router
from .replay import Recorded


class Ends(NamedTuple):
    """Weights around the blocks, as the operators take them."""

    first: list[Tensor]  # conv_1
    features: list[Tensor]  # norm and conv_2
    last: list[Tensor]  # the upsampler's convolution
    mean: Tensor


MOST_REPLAYS = 64  # sizes whose calls are recorded: each takes some 100 KB of the host's memory


def check_image(x: Tensor, in_chans: int):
    """Raise TypeError or ValueError for an input that the network cannot take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a torch.Tensor of shape (B, {in_chans}, H, W)")
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating type with values in [0, 1]: x.float() / 255")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a height and a width of at least 1")


class SeemoRe(Fused, reference.SeemoRe):
    """Drop-in SeemoRe: (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W), at least float32.

    Arguments, state dict, outputs and gradients are the published ones: see `reference.SeemoRe`.

    In eval mode and without gradients the whole network is one operator, on a CPU, and in 16 bits on a GPU; otherwise
    each block is a few fused ones. Weights are packed at every call; `prepare` freezes them. `recompute` trades time
    for memory in training.
    """

    group = ResGroup
    body: "ModuleList[ResGroup]"
    options = Fused.options | {MoEBlock: ("recursive", "use_shuffle"), Router: ("top_k",)}

    @wraps(reference.SeemoRe.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._recompute = "auto"
        self.engine_config = engine.EngineConfig.of(self.config)
        self.config_text = json.dumps(self.config)
        self._snapshot_structure()

    @property
    def recompute(self) -> str:
        """Activations that backward recomputes instead of reading stored ones; results are the same.

        "auto": those of little cost for the memory that they take, inside of SEE, where kernels compute them. "none":
        none, for speed. "block": all but the inputs of blocks, for a third more time and the least memory.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, how: str):
        if how not in CHOICES:
            raise ValueError(f"recompute is {how!r}, expected one of {', '.join(map(repr, CHOICES))}")
        self._recompute = how
        for block in self.blocks():
            block.recompute = how

    def blocks(self) -> list[Block]:
        """Return all blocks, in order; those that were replaced are left out."""
        return [block for group in self.body for block in group.children() if isinstance(block, Block)]

    def prepare(self, graph: bool = False) -> "SeemoRe":
        """Freeze a packed copy of the weights for inference, and return the model.

        Later changes of the parameters are not seen until train(), load_state_dict() or to() (any conversion) unfreeze
        it. A copy or a pickle of the model is not frozen. By Triton's kernels, calls for repeated image
        sizes are recorded and repeated without their Python (`seemore_fast.network.replay`).

        graph: on a CUDA device, replay a CUDA graph for repeated image sizes
        (`seemore_fast.network.graphs`). Each graph keeps the memory of a call.

        RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("the model is in training mode, expected inference: model.eval().prepare()")
        with torch.inference_mode(False), torch.no_grad():
            self._frozen = {
                "parameters": [weight.detach().clone() for weight in self.ordered_parameters()],
                "ends": self._frozen_ends(),
            }
            for block in self.blocks():
                if block.is_unmodified():
                    block.freeze()
            if engine.unsupported_reason(self, self.mean) is None:
                self._frozen["served"] = self.ordered_parameters()
                self.engine_weights(engine.config_of(self))
        ends = self._frozen["ends"]
        self._frozen["replays"] = Graphs(lambda x: self._launch(x, ends), MOST_REPLAYS, Recorded, "recording")
        if graph:
            self._frozen["graphs"] = Graphs(self._compute)
        return self

    def engine_weights(self, config: engine.EngineConfig) -> tuple[list[Tensor], bool]:
        """Return the weights for the engine, frozen by `prepare` or as they are now, and whether they are packed."""
        if not self._frozen:
            return self.ordered_parameters(), False
        key = tuple(config.numbers())
        if key not in self._frozen:
            if torch.compiler.is_compiling():
                return self._frozen["parameters"], False
            self._frozen[key] = engine.pack(self._frozen["parameters"], config)
        return [self._frozen[key]], True

    def are_frozen(self, weights: list[Tensor]) -> bool:
        """Return whether `weights` are the parameters that `prepare` found served by the engine, and copied."""
        served = self._frozen.get("served", [])
        return len(served) == len(weights) and all(map(is_, served, weights))

    def wants_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self.ordered_parameters()))

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_chans)
        if x.device != self.mean.device:
            raise ValueError(
                f"x is on {x.device}, expected {self.mean.device}, where the model is: move one of them with .to()"
            )
        if "graphs" in self._frozen and self._can_capture(x):
            return self._frozen["graphs"](x)
        if x.device.type != "cuda" or torch.compiler.is_compiling():
            return self._compute(x)
        return with_oom_hint(self._compute, self, x)

    def _compute(self, x: Tensor) -> Tensor:
        """Return the result by the engine, or, where it does not serve, by operators."""
        return engine.run(self, x) if engine.unsupported_reason(self, x) is None else self._padded(x)

    def _can_capture(self, x: Tensor) -> bool:
        if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        return self.is_unmodified() and not self.wants_gradients(x) and x.numel() > 0

    def _padded(self, x: Tensor) -> Tensor:
        """Return the result for x of any size: images that are too small are extended, and the result cropped."""
        height, width = x.shape[-2:]
        missing = (0, max(0, self.min_size - width), 0, max(0, self.min_size - height))
        if not any(missing):
            return self._by_operators(x)
        y = self._by_operators(F.pad(x, missing, mode="replicate"))
        return y[..., : height * self.scale, : width * self.scale]

    def _by_operators(self, x: Tensor) -> Tensor:
        """Return the result for x of at least `min_size` pixels a side, block by block."""
        kernels = select_backend("norm_conv3x3", x, self.conv_1.out_channels)
        has_kernels = kernels != "reference"
        if has_kernels:  # which take rows
            x = x.contiguous()
        elif x.device.type == "cpu":  # faster there (benchmarks/training.py); on GPUs it is the other way round
            # A copy, though it may have the layout already: a view of one image can have strides, of the batch's
            # dimension, that torch's convolutions do not take for channels_last.
            x = x.clone(memory_format=torch.channels_last)
        if not self.is_unmodified():
            return super().forward(x)  # by its submodules, so that all additions to them run
        keeps = self.wants_gradients(x)
        if keeps and node.is_served(self, x):
            return node.run(self, self._shifted(x))
        ends = self._ends_now() if keeps else self.ends()
        if kernels == "triton" and not keeps and not is_transformed() and not has_forward_gradients():
            x = self._shifted(x)
            if "replays" in self._frozen and not is_observed() and x.numel() > 0:
                return self._frozen["replays"](x)
            return self._launch(x, ends)
        x = (x.to(torch.promote_types(x.dtype, torch.float32)) - self.mean) * self.img_range
        f = self.first(x, ends)
        y = f.to(body_dtype(self.conv_1.weight))
        if not keeps and has_kernels:  # recomputed below: it is 1/5 of the peak memory, and cheap
            f = None
        for group in self.body:  # not as modules: a group would hold on to its input until its end
            y = group.local_block(y)
            y = group.global_block(y)
        y = ops.norm_conv3x3(y, *ends.features)
        if f is None:
            x = x.contiguous(memory_format=torch.channels_last)  # so that f is as the last convolution reads it
            y = self.first(x, ends).add_(y)
        else:
            y = f + y
        return self.last(y, ends)

    def _launch(self, x: Tensor, ends: Ends) -> Tensor:
        """Return the network's result for x, shifted, by kernels alone.

        The first convolution writes the body's dtype, and what is added to f is added where it is made.
        """
        y = new_image(x, self.conv_1.out_channels, body_dtype(self.conv_1.weight))
        with without_autocast(x.device.type):
            norm_conv3x3_into(y, x, None, None, *(weight.to(x.dtype) for weight in ends.first))
        for group in self.body:
            y = group.local_block(y)
            y = group.global_block(y)
        f = self.first(x, ends)  # as x with channels innermost, as the last convolution reads it
        norm_conv3x3_into(f, y, *ends.features, add=True)
        del y
        return self.last(f, ends)

    def _shifted(self, x: Tensor) -> Tensor:
        """Return (x - mean) * img_range with channels innermost, for Triton's kernels."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if torch.is_grad_enabled() and x.requires_grad:
            return (x - self.mean) * self.img_range
        room = new_packed(x, self.in_chans)
        if torch.compiler.is_compiling():  # which takes no `out` that is not contiguous
            return room.copy_((x - self.mean) * self.img_range)
        torch.sub(x, self.mean, out=room)
        return room if self.img_range == 1 else room.mul_(self.img_range)

    def first(self, x: Tensor, ends: Ends) -> Tensor:
        """Return conv_1 of x, shifted, in at least float32."""
        with without_autocast(x.device.type):
            return ops.norm_conv3x3(x, None, None, *(weight.to(x.dtype) for weight in ends.first))

    def last(self, y: Tensor, ends: Ends) -> Tensor:
        """Return the image of the features y."""
        weight, bias = ends.last
        return ops.conv3x3_shuffle(y, weight, bias, ends.mean, scale=self.scale, img_range=self.img_range)

    def ends(self) -> Ends:
        """Return the weights around the blocks: frozen, or as they are now."""
        return self._frozen["ends"] if self._frozen else self._ends_now()

    def _frozen_ends(self) -> Ends:
        stencils = [self.conv_1.weight, self.conv_2.weight, *parameters_of(self.upsampler[0])[:1]]
        copy, (first, features, last, mean) = partial(frozen, stencils=stencils), self._ends_now()
        wide = partial(copy, is_wide=True)
        return Ends([*map(wide, first)], [*map(copy, features)], [*map(wide, last)], wide(mean))

    def _ends_now(self) -> Ends:
        first, last = parameters_of(self.conv_1), parameters_of(self.upsampler[0])
        return Ends(first, parameters_of(self.norm, self.conv_2), last, self.mean)

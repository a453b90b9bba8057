"""SeemoRe whose two experts are one fused operator each; tree, keys and arguments are the reference's."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, ops
from ..backends.planes import new_image, new_packed
from ..memory import or_explain
from ..ops.library import laid_out, takes_planes
from ..ops.norm_conv3x3 import norm_conv3x3_into
from ..reference import model as plain
from ..reference.rme_block import channel_shuffle
from . import engine
from .graphs import Graphs
from .recompute import again_in_backward, check_recompute, is_transformed
from .replay import Recorded

MOST_REPLAYS = 64  # sizes whose calls are recorded: each takes some 100 KB of the host's memory


def _affine(*modules: nn.Module) -> list[Tensor]:
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


class Fused(nn.Module):
    """What can be computed by one operator, or by its plain modules where someone changed them.

    A hook, a `forward` of its own, a parametrization or another module put in place of one of those that it was built
    with sends it down the plain path: the same result, and everything that was added runs. Attributes that a module
    was built with (padding, stride, ...) are not looked at again: to change one, put in another module.

    What was frozen of its parameters thaws in train(), load_state_dict() and to() (any conversion), and is not copied.
    """

    def _remember(self):
        self._frozen = {}
        # A tuple is no submodule to torch; copying or pickling a module copies it with the modules it names.
        self._built_with = tuple((m, type(m), tuple(m._modules.values())) for m in self.modules())

    def is_untouched(self) -> bool:
        return all(
            type(module) is built_as
            and tuple(module._modules.values()) == children
            and (module is self or not plain.has_additions(module))
            and (built_as is not plain.LayerNorm or module.eps == 1e-6)
            for module, built_as, children in self._built_with
        )

    def train(self, mode: bool = True):
        if mode:
            self._frozen = {}
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self._frozen = {}
        return super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs):  # to(), float(), cuda(), ...
        self._frozen = {}
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frozen": {}}

    def built_weights(self) -> list[Tensor]:
        """Return the parameters in the state dict's order; one that two modules share comes twice."""
        weights = (weight for module, _, _ in self._built_with for weight in module._parameters.values())
        return [weight for weight in weights if weight is not None]


class FusedBlock(Fused):
    """What RME and SME share: x (B, C, H, W) -> the same."""

    recompute = "auto"  # SeemoRe.recompute sets it

    def is_untouched(self) -> bool:
        return super().is_untouched() and not plain.has_additions(self)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_untouched():
            return super().forward(x)
        return again_in_backward(self.fused, x) if self.recompute == "block" else self.fused(x)

    def freeze(self):
        """Keep a packed copy of the parameters, for calls without gradients, until something unfreezes it."""
        with torch.inference_mode(False), torch.no_grad():
            kept = [(frozen(weight, self.stencils()), is_wide) for weight, is_wide in self._arguments()]
            self._frozen = {"arguments": kept}

    def stencils(self) -> list[Tensor]:
        """Return the weights of 3x3 layers that kernels of layers read."""
        return [self.ffn.gate.weight]

    def arguments_now(self) -> list[Tensor]:
        """Return the tensors that the operator takes after x: frozen, or as they are now."""
        if not self._frozen or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return [tensor for tensor, _ in self._arguments()]
        dtype = plain.body_dtype(self.norm_1.weight)
        if dtype in self._frozen:
            return self._frozen[dtype]
        # Under autocast, all at once what operators would cast at every call.
        cast = [t if is_wide else t.to(dtype) for t, is_wide in self._frozen["arguments"]]
        if not torch.compiler.is_compiling():
            self._frozen[dtype] = cast
        return cast


def frozen(weight: Tensor, stencils: list[Tensor], is_wide: bool = False) -> Tensor:
    """Return a copy of a weight as kernels read it: in float32 at least, if it is wide, and 3x3 layers laid out."""
    copy = weight.detach().to(torch.promote_types(weight.dtype, torch.float32) if is_wide else weight.dtype, copy=True)
    return laid_out(copy) if takes_planes(weight) and any(weight is one for one in stencils) else copy


def _wide(*modules: nn.Module) -> list[tuple[Tensor, bool]]:
    return [(tensor, True) for tensor in _affine(*modules)]


def _narrow(*modules: nn.Module) -> list[tuple[Tensor, bool]]:
    return [(tensor, False) for tensor in _affine(*modules)]


class RME(FusedBlock, plain.RME):
    """Rank Modulating Expert."""

    def __init__(self, channels: int, **moe_options):
        super().__init__(channels, **moe_options)
        self._remember()

    def stencils(self) -> list[Tensor]:
        return [self.block.conv_1[0].weight, *super().stencils()]

    def _arguments(self) -> list[tuple[Tensor, bool]]:
        """Return what `ops.rme_block` takes after x, and of which of it autocast leaves the dtype alone."""
        block, moe = self.block, self.block.moe_layer
        expand = _affine(block.conv_1[2])
        if block.use_shuffle:  # of the channels that it makes: the same as of its rows
            expand = [channel_shuffle(parameter[None])[0] for parameter in expand]
        return [
            *_wide(self.norm_1),
            *_narrow(block.conv_1[0]),
            *((tensor, False) for tensor in expand),
            *_narrow(block.agg_conv[0], *block.conv, *block.conv_2[0].conv),
            (moe.gate.body[2].weight, True),
            *((tensor, False) for tensor in moe.packed_experts()),
            *_narrow(block.proj),
            *_wide(self.norm_2),
            *_narrow(self.ffn.fn_1[0], self.ffn.gate, self.ffn.fn_2[0]),
        ]

    def fused(self, x: Tensor) -> Tensor:
        block, moe = self.block, self.block.moe_layer
        return ops.rme_block(
            x,
            *self.arguments_now(),
            ranks=moe.ranks,
            top_k=moe.gate.top_k,
            recursive=block.recursive,
            use_shuffle=False,
        )


class SME(FusedBlock, plain.SME):
    """Spatial Modulating Expert."""

    def __init__(self, channels: int, kernel_size: int = 11):
        super().__init__(channels, kernel_size)
        self._remember()

    def _arguments(self) -> list[tuple[Tensor, bool]]:
        """Return what `ops.sme_block` takes after x, and of which of it autocast leaves the dtype alone."""
        block, ffn = self.block, self.ffn
        see = _wide(self.norm_1) + _narrow(block.to_qv[0], *block.attn.conv, block.proj)
        return see + _wide(self.norm_2) + _narrow(ffn.fn_1[0], ffn.gate, ffn.fn_2[0])

    def fused(self, x: Tensor) -> Tensor:
        # Making q and v again costs a layer and a stencil, keeping them a quarter of all that a group keeps.
        again = self.recompute == "auto" and backends.choose("norm_pointwise", x, x.shape[1]) != "reference"
        return ops.sme_block(x, *self.arguments_now(), recompute=again)


class ResGroup(plain.ResGroup):
    """Residual group: RME, then SME."""

    local_class, global_class = RME, SME


class SeemoRe(Fused, plain.SeemoRe):
    """The drop-in SeemoRe: same arguments, state dict, outputs and gradients as the published one.

    (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W), at least float32. The arguments and what is
    done with small images are described at `seemore_fast.reference.SeemoRe`.

    In eval mode, on a CPU and without gradients, the whole network is one operator; else each block is made of few
    fused ones. Weights are packed at every call; `prepare` freezes them. `recompute` is about memory in training.
    """

    group_class = ResGroup

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._recompute = "auto"
        self._remember()
        self._built_shapes = [weight.shape for weight in self.built_weights()]

    @property
    def recompute(self) -> str:
        """What is made again in backward instead of being kept from forward; results are the same.

        "auto": what is cheap to make for the memory that it takes, the inside of SEE, where kernels make it. "none":
        nothing, for speed. "block": all but the inputs of blocks, for a third more time and the least memory.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, how: str):
        check_recompute(how)
        self._recompute = how
        for block in (block for group in self.body for block in group.children() if isinstance(block, FusedBlock)):
            block.recompute = how

    def prepare(self, graph: bool = False) -> "SeemoRe":
        """Freeze a packed copy of the weights for inference, and return the model.

        Later changes of the parameters are not seen until train(), load_state_dict() or to() (any conversion) unfreeze
        it. A copy or a pickle of the model is not frozen. By Triton's kernels, calls for images of a size that comes
        again are recorded and repeated without their Python (`seemore_fast.network.replay`).

        graph: on a CUDA device, replay a CUDA graph for images of a size that comes again
        (`seemore_fast.network.graphs`). Each graph keeps the memory that a call takes.

        RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("the model is in training mode, expected inference: model.eval().prepare()")
        stencils = [self.conv_1.weight, self.conv_2.weight, self.upsampler[0].weight]
        with torch.inference_mode(False), torch.no_grad():
            self._frozen = {
                "parameters": [weight.detach().clone() for weight in self.built_weights()],
                "ends": [frozen(weight, stencils, is_wide) for weight, is_wide in self._ends()],
            }
            for group in self.body:
                for block in group.children():
                    if isinstance(block, FusedBlock) and block.is_untouched():
                        block.freeze()
            if engine.why_not(self, self.mean) is None:
                self.weights_now(engine.config_of(self))
        ends = self._frozen["ends"]
        self._frozen["replays"] = Graphs(lambda x: self._launch(x, ends), MOST_REPLAYS, Recorded, "recording")
        if graph:
            self._frozen["graphs"] = Graphs(super().forward)
        return self

    def weights_now(self, config: list[int]) -> tuple[list[Tensor], bool]:
        """Return what the engine computes with, and whether it is packed: frozen by `prepare`, or as it is now."""
        if not self._frozen:
            return self.built_weights(), False
        key = tuple(config)
        if key not in self._frozen:
            if torch.compiler.is_compiling():
                return self._frozen["parameters"], False
            self._frozen[key] = engine.pack(self._frozen["parameters"], config)
        return [self._frozen[key]], True

    def is_untouched(self) -> bool:
        """Tell whether all modules and parameters inside are those it was built with, as they were built."""
        c = self.config
        return (
            super().is_untouched()
            and self._built_shapes == [weight.shape for weight in self.built_weights()]
            and all(
                (block.recursive, block.use_shuffle, block.moe_layer.gate.top_k)
                == (c["recursive"], c["use_shuffle"], c["topk"])
                for block in (group.local_block.block for group in self.body)
            )
        )

    def wants_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self.built_weights()))

    def forward(self, x: Tensor) -> Tensor:
        plain.check_image(x, self.in_chans)
        if x.device != self.mean.device:
            raise ValueError(
                f"x is on {x.device}, expected {self.mean.device}, where the model is: move one of them with .to()"
            )
        if engine.why_not(self, x) is None:
            return engine.run(self, x)
        if "graphs" in self._frozen and self._can_capture(x):
            return self._frozen["graphs"](x)
        if x.device.type != "cuda" or torch.compiler.is_compiling():
            return super().forward(x)
        return or_explain(super().forward, self, x)

    def _can_capture(self, x: Tensor) -> bool:
        if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        return self.is_untouched() and not self.wants_gradients(x) and x.numel() > 0

    def _forward(self, x: Tensor) -> Tensor:
        kernels = backends.choose("norm_conv3x3", x, self.conv_1.out_channels)
        has_kernels = kernels != "reference"
        if has_kernels:  # which take lines
            x = x.contiguous()
        elif x.device.type == "cpu":  # faster there (benchmarks/training.py); on GPUs it is the other way round
            # A copy, though it may have the layout already: a view of one image can have strides, of the batch's
            # dimension, that torch's convolutions do not take for channels_last.
            x = x.clone(memory_format=torch.channels_last)
        if not self.is_untouched():
            return super()._forward(x)
        keeps = self.wants_gradients(x)
        weights = self._frozen["ends"] if self._frozen and not keeps else [weight for weight, _ in self._ends()]
        if kernels == "triton" and not keeps and not is_transformed() and forward_ad._current_level < 0:
            return self._forward_in_place(x, weights)
        x = (x.to(torch.promote_types(x.dtype, torch.float32)) - self.mean) * self.img_range
        f = self._first(x, *weights[:2])
        y = f.to(plain.body_dtype(self.conv_1.weight))
        # f is a fifth of the memory that a call takes, and next to no work for a kernel: made again rather than kept.
        again = not keeps and has_kernels
        if again:
            del f
        for group in self.body:  # not as modules: a group would hold on to its input until its end
            y = group.local_block(y)
            y = group.global_block(y)
        y = ops.norm_conv3x3(y, *weights[2:6])
        if again:
            x = x.contiguous(memory_format=torch.channels_last)  # so that f is as the last convolution reads it
            f = self._first(x, *weights[:2])
        y = f.add_(y) if again else f + y
        return ops.conv3x3_shuffle(y, *weights[6:], scale=self.scale, img_range=self.img_range)

    def _forward_in_place(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """Return the same by Triton's kernels, without gradients: images lie as kernels read and write them best."""
        x = self._shifted(x)
        is_observed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if "replays" in self._frozen and not is_observed and x.numel() > 0:
            return self._frozen["replays"](x)
        return self._launch(x, weights)

    def _launch(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """Return the network's result for x, shifted, by kernels alone.

        The first convolution writes the body's dtype, and what is added to f is added where it is made.
        """
        y = new_image(x, self.conv_1.out_channels, plain.body_dtype(self.conv_1.weight))
        with plain.without_autocast(x.device.type):
            norm_conv3x3_into(y, x, None, None, *(weight.to(x.dtype) for weight in weights[:2]))
        for group in self.body:
            y = group.local_block(y)
            y = group.global_block(y)
        f = self._first(x, *weights[:2])  # as x with channels innermost, as the last convolution reads it
        norm_conv3x3_into(f, y, *weights[2:6], add=True)
        del y
        return ops.conv3x3_shuffle(f, *weights[6:], scale=self.scale, img_range=self.img_range)

    def _shifted(self, x: Tensor) -> Tensor:
        """Return (x - mean) * img_range with channels innermost, for Triton's kernels."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        room = new_packed(x, self.in_chans)
        if torch.compiler.is_compiling():  # which takes no `out` that is not contiguous
            return room.copy_((x - self.mean) * self.img_range)
        torch.sub(x, self.mean, out=room)
        return room if self.img_range == 1 else room.mul_(self.img_range)

    def _first(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with plain.without_autocast(x.device.type):
            return ops.norm_conv3x3(x, None, None, weight.to(x.dtype), bias.to(x.dtype))

    def _ends(self) -> list[tuple[Tensor, bool]]:
        """Return the weights of all that is no block and the mean, and which of them are used in float32 at least."""
        first, last = _wide(self.conv_1), _wide(self.upsampler[0])
        return [*first, *_narrow(self.norm, self.conv_2), *last, (self.mean, True)]

"""SeemoRe whose two experts are one fused operator each; tree, keys and arguments are the reference's."""

import torch
import torch.nn as nn
from torch import Tensor

from . import engine, ops
from .reference import model as plain


def _affine(*modules: nn.Module) -> list[Tensor]:
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


class Fused(nn.Module):
    """What can be computed by one operator, or by its plain modules where someone changed them.

    A hook, a `forward` of its own, a parametrization or another module put in place of one of those that it was built
    with sends it down the plain path: the same result, and everything that was added runs. Attributes that a module
    was built with (padding, stride, ...) are not looked at again: to change one, put in another module.
    """

    def _remember(self):
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

    def built_weights(self) -> list[Tensor]:
        """Return the parameters in the state dict's order; one that two modules share comes twice."""
        weights = (weight for module, _, _ in self._built_with for weight in module._parameters.values())
        return [weight for weight in weights if weight is not None]


class FusedBlock(Fused):
    """What RME and SME share."""

    def is_untouched(self) -> bool:
        return super().is_untouched() and not plain.has_additions(self)

    def _ffn_parameters(self) -> list[Tensor]:
        return _affine(self.norm_2, self.ffn.fn_1[0], self.ffn.gate, self.ffn.fn_2[0])


class RME(FusedBlock, plain.RME):
    """Rank Modulating Expert; x (B, C, H, W)."""

    def __init__(self, channels: int, **moe_options):
        super().__init__(channels, **moe_options)
        self._remember()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_untouched():
            return super().forward(x)
        block, moe = self.block, self.block.moe_layer
        striped = block.conv_2[0].conv
        return ops.rme_block(
            x,
            *_affine(self.norm_1, block.conv_1[0], block.conv_1[2], block.agg_conv[0], *block.conv, *striped),
            moe.gate.body[2].weight,
            *moe.packed_experts(),
            *_affine(block.proj),
            *self._ffn_parameters(),
            ranks=moe.ranks,
            top_k=moe.gate.top_k,
            recursive=block.recursive,
            use_shuffle=block.use_shuffle,
        )


class SME(FusedBlock, plain.SME):
    """Spatial Modulating Expert; x (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int = 11):
        super().__init__(channels, kernel_size)
        self._remember()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_untouched():
            return super().forward(x)
        block = self.block
        return ops.sme_block(
            x, *_affine(self.norm_1, block.to_qv[0], *block.attn.conv, block.proj), *self._ffn_parameters()
        )


class ResGroup(plain.ResGroup):
    """Residual group: RME, then SME."""

    local_class, global_class = RME, SME


class SeemoRe(Fused, plain.SeemoRe):
    """The drop-in SeemoRe: same arguments, state dict, outputs and gradients as the published one.

    (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W), at least float32. The arguments and what is
    done with small images are described at `seemore_fast.reference.SeemoRe`.

    In eval mode, on a CPU and without gradients, the whole network is one operator. Its weights are packed at every
    call; `prepare` freezes them.
    """

    group_class = ResGroup

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._frozen = {}
        self._remember()
        self._built_shapes = [weight.shape for weight in self.built_weights()]

    def prepare(self) -> "SeemoRe":
        """Freeze a packed copy of the weights for inference on the CPU, and return the model.

        Later changes of the parameters are not seen until train(), load_state_dict() or to() (any conversion) unfreeze
        it. A copy or a pickle of the model is not frozen. RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("the model is in training mode, expected inference: model.eval().prepare()")
        with torch.no_grad():
            self._frozen = {"parameters": [weight.detach().clone() for weight in self.built_weights()]}
            if engine.why_not(self, self.mean) is None:
                self.weights_now(engine.config_of(self))
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

    def train(self, mode: bool = True) -> "SeemoRe":
        if mode:
            self._frozen = {}
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        self._frozen = {}
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs):  # to(), float(), cuda(), ...
        self._frozen = {}
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frozen": {}}

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

    def forward(self, x: Tensor) -> Tensor:
        plain.check_image(x, self.in_chans)
        return engine.run(self, x) if engine.why_not(self, x) is None else super().forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # faster there (benchmarks/bench_model.py); on GPUs it is the other way round
            # A copy, though it may have the layout already: a view of one image can have strides, of the batch's
            # dimension, that torch's convolutions do not take for channels_last.
            x = x.clone(memory_format=torch.channels_last)
        return super()._forward(x)

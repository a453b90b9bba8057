"""Blocks of the network: fused, or plain modules where they were modified."""

from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from ..backends import select_backend
from ..ops.allocation import laid_out, takes_planes
from ..ops.calibrate import check_aggregable
from ..ops.checks import check_tensors
from ..reference.model import SEE, LayerNorm, ResidualPair, StripedConv2d, body_dtype
from . import fused as f
from .checkpointing import checkpointed
from .modules import MoEBlock, has_additions, shuffle_channels
from .structure import Structure

FusedModule = TypeVar("FusedModule", bound="Fused")


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    """Return weight and bias of each module."""
    return [getattr(module, name) for module in modules for name in ("weight", "bias")]


def frozen(weight: Tensor, stencils: list[Tensor], is_wide: bool = False) -> Tensor:
    """Return a copy of a weight as kernels read it: in float32 at least, if it is wide, and 3x3 layers laid out."""
    copy = weight.detach().to(torch.promote_types(weight.dtype, torch.float32) if is_wide else weight.dtype, copy=True)
    return laid_out(copy) if takes_planes(weight) and any(weight is one for one in stencils) else copy


class Fused(nn.Module):
    """Base of modules that fused operators compute, or their plain submodules where those were modified.

    A hook, a `forward` of its own, a parametrization or another submodule than those it was built with selects the
    plain path: the same result, and all additions run. Attributes that a module was built with (padding, stride, ...)
    are not compared again: to change one, replace the module.

    What was frozen of its parameters thaws in train(), load_state_dict() and to() (any conversion), and is not copied.
    """

    options: ClassVar[dict[type, tuple[str, ...]]] = {LayerNorm: ("eps",)}  # of modules: fused operators ignore them

    def _snapshot_structure(self):
        self._frozen: dict[object, Any] = {}
        self.structure = Structure(self, self.options)

    def is_unmodified(self) -> bool:
        """Return whether all modules and parameters inside are those it was built with, as they were built."""
        return self.structure.has_modules() and self.structure.has_shapes(self.ordered_parameters())

    def train(self: FusedModule, mode: bool = True) -> FusedModule:
        if mode:
            self._frozen = {}
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._frozen = {}
        return super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any):  # to(), float(), cuda(), ...
        self._frozen = {}
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frozen": {}}

    def ordered_parameters(self) -> list[Tensor]:
        """Return the parameters in the state dict's order; one that two modules share comes twice."""
        return self.structure.parameters()


class Block(Fused, ResidualPair, Generic[f.AnyParams]):
    """RME or SME: x (B, C, H, W) -> the same."""

    recompute = "auto"  # set by SeemoRe.recompute

    def __init__(self, channels: int, block: nn.Module):
        super().__init__(channels, block)
        self._snapshot_structure()

    def is_unmodified(self) -> bool:
        return super().is_unmodified() and not has_additions(self)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_unmodified():
            return super().forward(x)
        check_tensors(type(self).__name__, x=(x, "B C H W"), norm_1=(self.norm_1.weight, "C"))
        return checkpointed(self.fused, x) if self.recompute == "block" else self.fused(x)

    def fused(self, x: Tensor) -> Tensor:
        """Return the result of fused operators."""
        raise NotImplementedError

    def _params(self) -> f.AnyParams:
        """Return the parameters as they are now."""
        raise NotImplementedError

    def kernels(self) -> f.Kernels:
        """Return the block by its operators' kernels."""
        raise NotImplementedError

    def stencils(self) -> list[Tensor]:
        """Return the weights of 3x3 layers that kernels of layers read."""
        return [self.ffn.gate.weight]

    def freeze(self):
        """Keep a copy of the parameters, for calls without gradients, until something unfreezes it."""
        with torch.inference_mode(False), torch.no_grad():
            stencils = self.stencils()
            self._frozen = {"params": f.map_params(lambda _, t: frozen(t, stencils), self._params())}

    def params(self) -> f.AnyParams:
        """Return the parameters that the operators take: frozen, or as they are now."""
        if not self._frozen or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return self._params()
        dtype = body_dtype(self.norm_1.weight)
        if dtype in self._frozen:
            return self._frozen[dtype]
        # Under autocast, all at once what operators would cast at every call.
        cast = f.cast_params(self._frozen["params"], dtype)
        if not torch.compiler.is_compiling():
            self._frozen[dtype] = cast
        return cast

    def _ffn_params(self) -> f.FFN:
        return f.FFN(*parameters_of(self.norm_2, self.ffn.fn_1[0], self.ffn.gate, self.ffn.fn_2[0]))


class RME(Block[f.RMEParams]):
    """Rank Modulating Expert."""

    block: MoEBlock

    def __init__(self, channels: int, *args: Any, **kwargs: Any):
        super().__init__(channels, MoEBlock(channels, *args, **kwargs))

    def stencils(self) -> list[Tensor]:
        return [*parameters_of(self.block.conv_1[0])[:1], *super().stencils()]

    def _params(self) -> f.RMEParams:
        block, moe = self.block, self.block.moe_layer
        widening, stripes = parameters_of(block.conv_1[2]), block.conv_2[0]
        assert isinstance(stripes, StripedConv2d)
        if block.use_shuffle:  # of the channels that it makes: the same as of its rows
            widening = [shuffle_channels(parameter, dim=0) for parameter in widening]
        return f.RMEParams(
            f.Expand(*parameters_of(self.norm_1, block.conv_1[0]), *widening),
            f.Calibrate(*parameters_of(block.agg_conv[0], *block.conv)),
            f.Stripes(*parameters_of(*stripes.conv)),
            f.Router(parameters_of(moe.gate.body[2])[0]),
            f.Experts(*moe.packed_experts(), *parameters_of(block.proj)),
            self._ffn_params(),
        )

    def kernels(self) -> f.RMEKernels:
        moe = self.block.moe_layer
        return f.RMEKernels(moe.ranks, moe.gate.top_k, self.block.recursive)

    def fused(self, x: Tensor) -> Tensor:
        block, moe = self.block, self.block.moe_layer
        check_aggregable("RME", "x", x.shape[2], x.shape[3], block.recursive)
        return f.rme(x, self.params(), moe.ranks, moe.gate.top_k, block.recursive)


class SME(Block[f.SMEParams]):
    """Spatial Modulating Expert."""

    block: SEE

    def __init__(self, channels: int, kernel_size: int = 11):
        super().__init__(channels, SEE(channels, kernel_size))

    def _params(self) -> f.SMEParams:
        see = self.block
        return f.SMEParams(
            f.QV(*parameters_of(self.norm_1, see.to_qv[0])),
            f.Stripes(*parameters_of(*see.attn.conv)),
            f.Projection(*parameters_of(see.proj)),
            self._ffn_params(),
        )

    def kernels(self) -> f.SMEKernels:
        return f.SMEKernels(recompute=False)

    def fused(self, x: Tensor) -> Tensor:
        # Recomputing q and v costs a layer and a stencil, storing them a quarter of all that a group stores.
        recompute = self.recompute == "auto" and select_backend("norm_pointwise", x, x.shape[1]) != "reference"
        return f.sme(x, self.params(), recompute)


class ResGroup(nn.Module):
    """Residual group: RME, then SME."""

    def __init__(self, channels: int, kernel_size: int, *of_moe: Any):
        super().__init__()
        self.local_block = RME(channels, *of_moe)
        self.global_block = SME(channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.global_block(self.local_block(x))

"""RME and SME, the two halves of a residual group, as functions of few fused operators each.

In the paper: "Rank Modulating Expert" and "Spatial Modulating Expert".
"""

import contextlib
from collections import namedtuple
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops, reference
from .._torch_compat import is_transformed
from ..backends import backend_of, is_plain, select_backend
from ..ops.allocation import empty_like
from ..ops.autocast import autocast_dtype, castable
from ..ops.operator import refuse_second_derivative
from ..ops.router import gradients_of_decision
from ..ops.striped_conv_router import has_kernel, stripes_backward
from .checkpointing import checkpointed
from .replay import launching

EPS = 1e-6  # of LayerNorm
OPERATORS = ("norm_pointwise", "norm_conv3x3", "striped_conv", "calibrate", "low_rank_experts", "gated_ffn")

# Parameters, operator by operator


Expand = namedtuple("Expand", ops.norm_conv3x3.parameters)
Calibrate = namedtuple("Calibrate", ops.calibrate.parameters)
Stripes = namedtuple("Stripes", ops.striped_conv.parameters)
Router = namedtuple("Router", ["weight_router"])
Experts = namedtuple("Experts", ops.low_rank_experts.parameters)
QV = namedtuple("QV", ops.norm_pointwise.parameters)
Projection = namedtuple("Projection", ["weight", "bias"])
FFN = namedtuple("FFN", ops.gated_ffn.parameters)
WIDE = ("norm_weight", "norm_bias", "weight_router")  # stay in their own dtype under autocast


class RMEParams(NamedTuple):
    """Parameters of `rme`."""

    expand: Expand
    calibrate: Calibrate
    stripes: Stripes
    router: Router
    experts: Experts
    ffn: FFN


class SMEParams(NamedTuple):
    """Parameters of `sme`."""

    qv: QV
    stripes: Stripes
    proj: Projection
    ffn: FFN


Params = RMEParams | SMEParams
AnyParams = TypeVar("AnyParams", RMEParams, SMEParams)


def flatten(params: Params) -> list[Tensor]:
    """Return all tensors of `params`, one after another."""
    return [tensor for part in params for tensor in part]


def unflatten(kind: type[AnyParams], tensors: Iterable[Tensor]) -> AnyParams:
    """Return the parameters of which `tensors` are the flat list."""
    tensors = iter(tensors)
    return kind._make(part._make(islice(tensors, len(part._fields))) for part in kind.__annotations__.values())


def map_params(function: Callable[[str, Any], Any], params: AnyParams) -> AnyParams:
    """Return function(name, tensor) of all tensors of `params`, in the same structure."""
    return params._make(part._make(map(function, part._fields, part)) for part in params)


def cast_params(params: AnyParams, dtype: torch.dtype) -> AnyParams:
    """Return the parameters in `dtype`, but for those of the norms and the router, and float64 ones."""
    return map_params(lambda name, t: t.to(dtype) if name not in WIDE and castable(t) else t, params)


def autocast_params(params: AnyParams) -> AnyParams:
    """Return the parameters as autocast has them now."""
    dtype = autocast_dtype(params[0][0])
    return params if dtype is None else cast_params(params, dtype)


# The blocks as functions


def rme(x: Tensor, params: RMEParams, ranks: list[int], top_k: int, recursive: int) -> Tensor:
    """Return RME of x: MoRE, then GatedFFN, each behind a LayerNorm and a residual; (B, C, H, W) -> the same.

    a, k = chunk(weight_pw @ GELU(conv_3x3(LN(x))) + bias_pw, 2);   a = GELU(striped_3(a));   k = calibrate(k)
    x    = x + weight_proj @ low_rank_experts(a, k, *router(a)) + bias_proj
    y    = gated_ffn(x)
    """
    has_kernels = has_kernel(params.stripes.weight_row.shape[3], len(params.router.weight_router))
    if has_kernels and x.dtype != torch.float64 and is_single_node(x, params.stripes.weight_row.shape[3]):
        return BlockNode.apply(x, RMEKernels(ranks, top_k, recursive), *flatten(autocast_params(params)))
    parts = _parts()
    a, k = widen(x, params)
    router = params.router.weight_router
    a, index, weight = parts.striped_conv_router(
        a, *params.stripes, weight_router=router, top_k=top_k, activation="gelu"
    )
    k = parts.calibrate(k, *params.calibrate, recursive=recursive)
    x = modulate(x, a, k, index, weight, params, ranks)
    del a, k  # and with them their memory
    return parts.gated_ffn(x, *params.ffn)


def widen(x: Tensor, params: RMEParams) -> tuple[Tensor, Tensor]:
    """Return both halves of the widened image, before their own steps."""
    a, k = _parts().norm_conv3x3(x, *params.expand, activation="gelu").chunk(2, dim=1)
    return a, k


def modulate(
    x: Tensor, a: Tensor, k: Tensor, index: Tensor, weight: Tensor, params: RMEParams, ranks: list[int]
) -> Tensor:
    """Return x and the projected experts' result for a and k, by the router's decision."""
    *packed, weight_proj, bias_proj = params.experts
    projection = {"weight_proj": weight_proj, "bias_proj": bias_proj}
    return _parts().low_rank_experts(a, k, index, weight, *packed, ranks=ranks, **projection, residual=x)


def _parts():
    """Return the module whose operators compute: exported graphs have plain ones only."""
    return reference if is_plain() else ops


def sme(x: Tensor, params: SMEParams, recompute: bool = False) -> Tensor:
    """Return SME of x: SEE, then GatedFFN, each behind a LayerNorm and a residual; (B, C, H, W) -> the same.

        q, v = chunk(GELU(weight_qv @ LN(x) + bias_qv), 2)
        x    = x + weight_proj @ (striped_conv(q) * v) + bias_proj
        y    = gated_ffn(x)

    With `recompute`, nothing inside of SEE is stored for backward.
    """
    if is_single_node(x, params.stripes.weight_row.shape[3]):
        return BlockNode.apply(x, SMEKernels(recompute), *flatten(autocast_params(params)))
    *of_see, of_ffn = params
    tensors = [tensor for part in of_see for tensor in part]
    x = checkpointed(see, x, *tensors) if recompute else see(x, *tensors)
    return _parts().gated_ffn(x, *of_ffn)


def see(x: Tensor, *tensors: Tensor) -> Tensor:
    """Return SEE of x with its LayerNorm and residual, the first half of `sme`."""
    parts = _parts()
    q, v = parts.norm_pointwise(x, *tensors[:4], activation="gelu").chunk(2, dim=1)
    q = parts.striped_conv(q, *tensors[4:8], gate=v)
    del v  # and with it the memory of both halves
    return parts.pointwise(q, *tensors[8:], residual=x)


# The blocks by their operators' kernels
#
# These are called one after another, without a node, a check and a dispatcher's call for each, and halves of an image
# get their gradients as such, in place. Results are those of the operators by themselves.


def is_single_node(x: Tensor, taps: int) -> bool:
    """Return whether a block of x, with so many taps, can be one node: in eager mode, by kernels of x's device.

    On a GPU only where gradients are recorded: operators by themselves need less memory.
    """
    if is_plain() or torch.compiler.is_compiling() or is_transformed() or len(x) == 0:
        return False
    sizes = {"striped_conv": taps}
    backends = {select_backend(operator, x, sizes.get(operator, x.shape[1])) for operator in OPERATORS}
    return backends == {"cpu"} or (torch.is_grad_enabled() and not backends & {"cpu", "reference"})


class RMEKernels(NamedTuple):
    """`rme`. Kept for backward, beside x: a and k before and after their steps, the decision, the map of `calibrate`
    and the input of `gated_ffn`."""

    ranks: list[int]
    top_k: int
    recursive: int

    params = RMEParams
    kept = 9

    def forward(self, x: Tensor, p: RMEParams) -> tuple[Tensor, list[Tensor]]:
        """Return y and what is kept."""
        widened = ops.norm_conv3x3.forward(x, *p.expand, "gelu", EPS)
        a, k = widened.chunk(2, dim=1)
        a, *decision = ops.striped_conv_router.forward(a, *p.stripes, *p.router, self.top_k, "gelu")
        k, maps = ops.calibrate.forward(k, *p.calibrate, self.recursive)
        middle = ops.low_rank_experts.forward(a, k, *decision[:2], *p.experts[:6], self.ranks, *p.experts[6:], x)
        return ops.gated_ffn.forward(middle, *p.ffn, EPS), [widened, a, *decision, k, maps, middle]

    def backward(
        self, dy: Tensor, x: Tensor, kept: list[Tensor], p: RMEParams, into: RMEParams | None = None, **turned: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of x and of all parameters, these in the memory of `into` if given."""
        widened, a, index, weight, mean, probability, k, maps, middle = kept
        rooms = rooms_of(RMEParams, into)
        dmiddle, *of_ffn = ops.gated_ffn.backward_into(rooms.ffn, dy, middle, *p.ffn, EPS)
        da, dk, dweight, *of_experts = ops.low_rank_experts.backward_into(
            rooms.experts, dmiddle, a, k, index, weight, *p.experts[:6], self.ranks, *p.experts[6:]
        )
        of_router = rooms.router.get("weight_router")
        dmean, of_router = gradients_of_decision(dweight, index, mean, probability, *p.router, of_router)
        dwidened, da_in, dk_in = halves_like(widened)
        a_in, k_in = widened.chunk(2, dim=1)
        of_k, of_a = rooms.calibrate | {"k": dk_in}, rooms.stripes | {"x": da_in}
        _, *of_calibrate = ops.calibrate.backward_into(of_k, dk, maps, k_in, *p.calibrate, self.recursive)
        _, _, *of_stripes = stripes_backward(of_a, da, dmean, a_in, *p.stripes, "gelu")
        dx, *of_expand = ops.norm_conv3x3.backward_into(
            rooms.expand, dwidened, x, *p.expand, "gelu", EPS, residual=dmiddle, **turned
        )
        return dx, *of_expand, *of_calibrate, *of_stripes, of_router, *of_experts, *of_ffn


class SMEKernels(NamedTuple):
    """`sme`. Kept for backward, beside x: the input of `gated_ffn`, and unless `recompute` q, v and their product."""

    recompute: bool

    params = SMEParams

    @property
    def kept(self) -> int:
        return 1 if self.recompute else 3

    def forward(self, x: Tensor, p: SMEParams) -> tuple[Tensor, list[Tensor]]:
        """Return y and what is kept."""
        qv, mixed = self.enhance(x, p)
        middle = ops.norm_pointwise.forward(mixed, None, None, *p.proj, None, EPS, x)
        kept = [middle] if self.recompute else [middle, qv, mixed]
        return ops.gated_ffn.forward(middle, *p.ffn, EPS), kept

    def backward(
        self, dy: Tensor, x: Tensor, kept: list[Tensor], p: SMEParams, into: SMEParams | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gradients of x and of all parameters, these in the memory of `into` if given."""
        middle, *inside = kept
        qv, mixed = self.enhance(x, p) if self.recompute else inside
        rooms = rooms_of(SMEParams, into)
        dmiddle, *of_ffn = ops.gated_ffn.backward_into(rooms.ffn, dy, middle, *p.ffn, EPS)
        dmixed, _, _, *of_proj = ops.norm_pointwise.backward_into(
            rooms.proj, dmiddle, mixed, None, None, *p.proj, None, EPS
        )
        q, v = qv.chunk(2, dim=1)
        dqv, dq, dv = halves_like(qv)
        of_q = rooms.stripes | {"x": dq, "gate": dv}
        _, _, *of_stripes = ops.striped_conv.backward_into(of_q, dmixed, q, *p.stripes, None, v)
        dx, *of_qv = ops.norm_pointwise.backward_into(rooms.qv, dqv, x, *p.qv, "gelu", EPS, residual=dmiddle)
        return dx, *of_qv, *of_stripes, *of_proj, *of_ffn

    @staticmethod
    def enhance(x: Tensor, p: SMEParams) -> tuple[Tensor, Tensor]:
        """Return q and v, one after the other, and what SEE's projection reads."""
        qv = ops.norm_pointwise.forward(x, *p.qv, "gelu", EPS, None)
        q, v = qv.chunk(2, dim=1)
        return qv, ops.striped_conv.forward(q, *p.stripes, None, v)


Kernels = RMEKernels | SMEKernels


def rooms_of(kind: type[AnyParams], into: AnyParams | None) -> Any:
    """Return for each part of the parameters the memory of its gradients by name, nothing where `into` is None."""
    if into is None:
        return kind._make({} for _ in kind._fields)
    return kind._make(part._asdict() for part in into)


def halves_like(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradient of an image, and its two halves of the channels."""
    whole = empty_like(image)
    first, second = whole.chunk(2, dim=1)
    return whole, first, second


def joining(x: Tensor) -> contextlib.AbstractContextManager:
    """Return the context in which the last launches of a block's gradients are joined, if Triton computes them."""
    is_joined = backend_of("gated_ffn", x, x.shape[1]) == "triton"
    return launching().joining(x.device) if is_joined else contextlib.nullcontext()


# The blocks as single nodes of autograd's graph


def differentiable_once(backward: Callable) -> Callable:
    """Make a node's backward(ctx, dy) refuse to be differentiated, as that of an operator does."""

    @wraps(backward)
    def without_gradient(ctx: Any, dy: Tensor) -> tuple:
        with torch.no_grad():
            gradients = backward(ctx, dy)
        return NonDifferentiable.apply(dy, *gradients) if torch.is_grad_enabled() else gradients

    return without_gradient


class NonDifferentiable(torch.autograd.Function):
    """Gradients as they are, none of which has a gradient."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *gradients: Tensor | None) -> tuple:
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        refuse_second_derivative("a block of SeemoRe", ctx)


class BlockNode(torch.autograd.Function):
    """A block as a single node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels, *tensors: Tensor) -> Tensor:
        kind: Any = kernels.params
        y, kept = kernels.forward(x, unflatten(kind, tensors))
        ctx.kernels = kernels
        ctx.save_for_backward(x, *kept, *tensors)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, *saved = ctx.saved_tensors
        kernels: Any = ctx.kernels
        kept, tensors = saved[: kernels.kept], saved[kernels.kept :]
        with joining(x):
            dx, *gradients = kernels.backward(dy, x, kept, unflatten(kernels.params, tensors))
        return dx, None, *gradients

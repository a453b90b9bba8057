"""RME and SME, the two halves of a residual group, as functions of few fused operators each.

In the paper: "Rank Modulating Expert" and "Spatial Modulating Expert".
"""

from collections import namedtuple
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops, reference
from .._torch_compat import is_transformed
from ..backends import is_plain, select_backend
from ..ops.autocast import autocast_dtype, castable
from ..ops.operator import refuse_second_derivative
from ..ops.router import gradients_of_decision
from ..ops.striped_conv_router import has_kernel, spread_over_pixels
from .checkpointing import checkpointed

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


def map_params(function: Callable[[str, Tensor], Tensor], params: AnyParams) -> AnyParams:
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
    if has_kernels and x.dtype != torch.float64 and is_single_node(x):
        return RMENode.apply(x, ranks, top_k, recursive, *flatten(autocast_params(params)))
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
    if is_single_node(x):
        return SMENode.apply(x, recompute, *flatten(autocast_params(params)))
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


# The blocks as single nodes of autograd's graph
#
# Their operators' kernels are called one after another, without a node, a check and a dispatcher's call for each, and
# halves of an image get their gradients as such, in place. Results are those of the operators by themselves.


def is_single_node(x: Tensor) -> bool:
    """Return whether a block of x can be one node: on a CPU, in eager mode, with images in the batch."""
    if is_plain() or torch.compiler.is_compiling() or is_transformed() or x.device.type != "cpu":
        return False
    return len(x) > 0 and all(select_backend(operator, x, x.shape[1]) == "cpu" for operator in OPERATORS)


def halves_like(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradient of an image, and its two halves of the channels."""
    whole = torch.empty_like(image)
    first, second = whole.chunk(2, dim=1)
    return whole, first, second


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


class RMENode(torch.autograd.Function):
    """`rme` on the CPU's kernels. Stored for backward: x, a and k before and after their steps, the decision, the map
    of `calibrate` and the input of `gated_ffn`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: list[int], top_k: int, recursive: int, *tensors: Tensor) -> Tensor:
        p = unflatten(RMEParams, tensors)
        widened = ops.norm_conv3x3.forward(x, *p.expand, "gelu", EPS)
        a, k = widened.chunk(2, dim=1)
        a, *decision = ops.striped_conv_router.forward(a, *p.stripes, *p.router, top_k, "gelu")
        k, maps = ops.calibrate.forward(k, *p.calibrate, recursive)
        middle = ops.low_rank_experts.forward(a, k, *decision[:2], *p.experts[:6], ranks, *p.experts[6:], x)
        ctx.ranks, ctx.recursive = ranks, recursive
        ctx.save_for_backward(x, widened, a, *decision, k, maps, middle, *tensors)
        return ops.gated_ffn.forward(middle, *p.ffn, EPS)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, widened, a, index, weight, mean, probability, k, maps, middle, *tensors = ctx.saved_tensors
        p = unflatten(RMEParams, tensors)
        dmiddle, *of_ffn = ops.gated_ffn.backward(dy, middle, *p.ffn, EPS)
        da, dk, dweight, *of_experts = ops.low_rank_experts.backward(
            dmiddle, a, k, index, weight, *p.experts[:6], ctx.ranks, *p.experts[6:]
        )
        dmean, of_router = gradients_of_decision(dweight, index, mean, probability, *p.router)
        da.add_(spread_over_pixels(dmean, da))
        dwidened, da_in, dk_in = halves_like(widened)
        a_in, k_in = widened.chunk(2, dim=1)
        _, *of_calibrate = ops.calibrate.backward_into({"k": dk_in}, dk, maps, k_in, *p.calibrate, ctx.recursive)
        _, _, *of_stripes = ops.striped_conv.backward_into({"x": da_in}, da, a_in, *p.stripes, "gelu", None)
        dx, *of_expand = ops.norm_conv3x3.backward(dwidened, x, *p.expand, "gelu", EPS)
        gradients = (*of_expand, *of_calibrate, *of_stripes, of_router, *of_experts, *of_ffn)
        return dx.add_(dmiddle), None, None, None, *gradients


class SMENode(torch.autograd.Function):
    """`sme` on the CPU's kernels. Stored for backward: x, the input of `gated_ffn`, and unless `recompute` q, v and
    their product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recompute: bool, *tensors: Tensor) -> Tensor:
        p = unflatten(SMEParams, tensors)
        qv, mixed = SMENode.enhance(x, p)
        middle = ops.norm_pointwise.forward(mixed, None, None, *p.proj, None, EPS, x)
        ctx.recompute = recompute
        ctx.save_for_backward(x, middle, *tensors, *(() if recompute else (qv, mixed)))
        return ops.gated_ffn.forward(middle, *p.ffn, EPS)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, middle, *saved = ctx.saved_tensors
        p = unflatten(SMEParams, saved)
        qv, mixed = SMENode.enhance(x, p) if ctx.recompute else saved[-2:]
        dmiddle, *of_ffn = ops.gated_ffn.backward(dy, middle, *p.ffn, EPS)
        dmixed, _, _, *of_proj = ops.norm_pointwise.backward(dmiddle, mixed, None, None, *p.proj, None, EPS)
        q, v = qv.chunk(2, dim=1)
        dqv, dq, dv = halves_like(qv)
        _, _, *of_stripes = ops.striped_conv.backward_into({"x": dq, "gate": dv}, dmixed, q, *p.stripes, None, v)
        dx, *of_qv = ops.norm_pointwise.backward(dqv, x, *p.qv, "gelu", EPS)
        return dx.add_(dmiddle), None, *of_qv, *of_stripes, *of_proj, *of_ffn

    @staticmethod
    def enhance(x: Tensor, p: SMEParams) -> tuple[Tensor, Tensor]:
        """Return q and v, one after the other, and what SEE's projection reads."""
        qv = ops.norm_pointwise.forward(x, *p.qv, "gelu", EPS, None)
        q, v = qv.chunk(2, dim=1)
        return qv, ops.striped_conv.forward(q, *p.stripes, None, v)

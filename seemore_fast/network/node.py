"""The whole network as a single node of autograd's graph: a training step by the operators' kernels on a GPU.

The weights of a step are gathered into flat buffers (`weights`): they are those of the forward even if parameters
change before its backward. What forward and backward launch is recorded for a size and repeated (`replay`).
"""

import functools
import importlib
import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from .._torch_compat import has_forward_gradients, is_observed, is_transformed
from ..backends import FLOATS, current_backend, select_backend, use_backend, without_kernels
from ..backends.planes import new_image, new_packed
from ..ops.allocation import empty_like
from ..ops.autocast import autocast_dtype
from ..ops.norm_conv3x3 import write_into
from ..ops.operator import LIBRARY, define, refuse_second_derivative
from ..ops.striped_conv_router import has_kernel
from ..reference.model import body_dtype
from ..reference.router import without_autocast
from . import fused as f
from .graphs import Graphs
from .replay import Recorded
from .weights import Weights

MOST = 16  # sizes of which steps are recorded: each takes some 500 KB of the host's memory
FIRST = -1  # number of the first convolution, before the blocks'


class Options(NamedTuple):
    """What a step depends on beside its tensors."""

    scale: int
    img_range: float
    recompute: str
    first: int  # block, or FIRST, before which no gradient is needed
    wants_dx: bool


def is_served(model: Any, x: Tensor) -> bool:
    """Return whether kernels on a GPU, or in Triton's interpreter, compute each operator of a step of x, now."""
    if x.numel() == 0 or (not torch.compiler.is_compiling() and (is_transformed() or has_forward_gradients())):
        return False
    weight, mean, c = model.conv_1.weight, model.mean, model.config
    is_cast = autocast_dtype(x) is not None and weight.dtype != torch.float32
    if is_cast or mean.requires_grad or x.dtype == torch.float64 or weight.dtype not in FLOATS:
        return False
    if any(p.dtype != weight.dtype or p.device != weight.device for p in model.ordered_parameters()):
        return False
    experts = model.body[0].local_block.block.moe_layer.ranks if len(model.body) else []
    if not experts or not has_kernel(3, len(experts)):
        return False
    channels = c["embedding_dim"]
    sizes: dict[str, int] = dict.fromkeys(f.OPERATORS, channels)
    sizes |= {
        "striped_conv": c["global_kernel_size"],
        "striped_conv_router": 3,
        "router": len(experts),
        "low_rank_experts": max(channels, *experts),
    }
    backends = {select_backend(operator, x, size) for operator, size in sizes.items()}
    with without_autocast(x.device.type):
        backends.add(select_backend("conv3x3_shuffle", x, max(channels, c["in_chans"] * c["scale"] ** 2)))
    return not backends & {"cpu", "reference"}


class Steps:
    """Forward and backward of a network on a device, recorded by size."""

    def __init__(self, numbered: Any, device: torch.device):
        """`numbered` is a network of the same structure whose parameters are numbers (`weights`)."""
        self.weights, blocks = Weights(numbered, device), numbered.blocks()
        self._channels, self._kernels = numbered.conv_1.out_channels, [block.kernels() for block in blocks]
        numbers = {id(p): number for number, block in enumerate(blocks) for p in block.parameters()}
        numbers |= {id(p): FIRST for p in numbered.conv_1.parameters()}
        self._number_of = [numbers.get(id(p), len(blocks)) for p in numbered.ordered_parameters()]
        self._recordings: dict[tuple, Graphs] = {}

    def first_of(self, needs: tuple[bool, ...], wants_dx: bool) -> int:
        """Return the first block, or FIRST, that has a parameter which needs a gradient."""
        needed = (number for number, is_needed in zip(self._number_of, needs, strict=True) if is_needed)
        return FIRST if wants_dx else min(needed, default=len(self._kernels))

    def run(self, part: Callable, options: Options, *given: Tensor) -> list[Tensor]:
        """Return part(options, *given), as it is or as recorded."""
        function = partial(part, self, options)
        if is_observed():
            return function(*given)
        key = part, options
        if key not in self._recordings:
            self._recordings[key] = Graphs(function, MOST, Recorded, "recording")
        return self._recordings[key](*given)

    def kernels(self, options: Options) -> list[f.Kernels]:
        again = options.recompute == "auto"
        return [f.SMEKernels(again) if isinstance(kernels, f.SMEKernels) else kernels for kernels in self._kernels]

    def forward(self, options: Options, wide: Tensor, narrow: Tensor, mean: Tensor, x: Tensor) -> list[Tensor]:
        """Return the image, and what backward reads: f with the body's result, that, and of each block what it keeps.

        `x` is shifted.
        """
        weights, kept = self.weights.weights(narrow, wide), []
        image = new_packed(x, self._channels, wide.dtype)
        write_into(image, x, None, None, *weights.first, f.EPS, False)
        y = new_image(x, self._channels, narrow.dtype).copy_(image)
        for number, (kernels, params) in enumerate(zip(self.kernels(options), weights.blocks, strict=True)):
            result, inside = kernels.forward(y, params)
            if number >= options.first:
                kept += [y] if options.recompute == "block" else [y, *inside]
            y = result
        write_into(image, y, *weights.features, f.EPS, True)
        result = ops.conv3x3_shuffle.forward(image, *weights.last, mean, options.scale, options.img_range)
        return [result, image, y, *kept]

    def backward(
        self, options: Options, wide: Tensor, narrow: Tensor, x: Tensor, dy: Tensor, *kept: Tensor
    ) -> list[Tensor]:
        """Return the gradients of the parameters, one after another, and that of x, if wanted."""
        image, y, *inside = kept
        weights, blocks = self.weights.weights(narrow, wide), self.kernels(options)
        buffer, gradients = self.weights.new_gradient(wide)
        *turned, of_features = weights.turned
        layer, shift = ("weight", "bias"), (options.scale, options.img_range)
        with f.joining(image):
            into = dict(zip(layer, gradients.last, strict=True))
            dimage, *_ = ops.conv3x3_shuffle.backward_into(into, dy, image, *weights.last, *shift)
            into = dict(zip(("norm_weight", "norm_bias", *layer), gradients.features, strict=True))
            features = *weights.features, None, None, None, f.EPS
            dy, *_ = ops.norm_conv3x3.backward_into(into, dimage, y, *features, turned=of_features)
        inside = iter(inside)
        numbers = range(max(options.first, 0), len(blocks))
        counts = [1 if options.recompute == "block" else 1 + blocks[number].kept for number in numbers]
        of_blocks = [list(islice(inside, count)) for count in counts]
        for number in reversed(numbers):
            (y, *of_block), params = of_blocks.pop(), weights.blocks[number]
            if options.recompute == "block":
                _, of_block = blocks[number].forward(y, params)
            columns = {} if turned[number] is None else {"turned": turned[number]}
            with f.joining(y):
                dy, *_ = blocks[number].backward(dy, y, of_block, params, gradients.blocks[number], **columns)
        dx = []
        if options.first == FIRST:
            into = dict(zip(layer, gradients.first, strict=True)) | ({} if options.wants_dx else {"x": None})
            first = *weights.first, None, None, None, f.EPS
            with f.joining(x):
                dx, *_ = ops.norm_conv3x3.backward_into(into, dimage + dy, x, None, None, *first)
            dx = [dx] if options.wants_dx else []
        return [self.weights.in_order(buffer), *dx]


@functools.lru_cache(maxsize=8)
def steps_of(config: str, device: torch.device) -> Steps:
    """Return the steps of all networks of a configuration, given as JSON, on a device."""
    network = importlib.import_module("seemore_fast.network.model").SeemoRe  # which imports this module
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):  # so that no random number is drawn
            numbered = network(**json.loads(config)).double()
        numbered, first = numbered.to_empty(device="cpu"), 0
        for parameter in numbered.ordered_parameters():
            torch.arange(first, first + parameter.numel(), out=parameter.data.view(-1))
            first += parameter.numel()
        return Steps(numbered, device)


def run(model: Any, x: Tensor) -> Tensor:
    """Return the model's result for x, shifted, with a graph of one node."""
    parameters, mean = model.ordered_parameters(), model.mean.to(x.dtype)
    if torch.compiler.is_compiling():
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        how = model.config_text, model.scale, float(model.img_range), model.recompute, x.requires_grad
        return torch.ops.seemore_fast.network_step(flat, mean, x, body_dtype(model.conv_1.weight), *how)[0]
    steps = steps_of(model.config_text, x.device)
    options = Options(model.scale, float(model.img_range), model.recompute, FIRST, False)
    return Step.apply(steps, options, mean, x, *parameters)


class Step(torch.autograd.Function):
    """The network as a node: x, shifted, and all parameters in the order of `ordered_parameters` -> the image."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, options: Options, mean: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        _, _, _, wants_dx, *needs = ctx.needs_input_grad
        options = options._replace(wants_dx=wants_dx, first=steps.first_of(tuple(needs), wants_dx))
        wide, narrow = steps.weights.gather(steps.weights.flatten(parameters), body_dtype(parameters[0]))
        result, *kept = steps.run(Steps.forward, options, wide, narrow, mean, x)
        ctx.steps, ctx.options, ctx.dtype, ctx.backend = steps, options, parameters[0].dtype, current_backend()
        ctx.save_for_backward(wide, narrow, x, *kept)
        return result

    @staticmethod
    @f.differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple:
        wide, narrow, x, *kept = ctx.saved_tensors
        with use_backend(ctx.backend):
            flat, *dx = ctx.steps.run(Steps.backward, ctx.options, wide, narrow, x, dy, *kept)
        gradients = ctx.steps.weights.scatter(flat.to(ctx.dtype))
        needed = (g if needs else None for g, needs in zip(gradients, ctx.needs_input_grad[4:], strict=True))
        return None, None, None, dx[0] if dx else None, *needed


# The same as an operator, which compiled graphs have in them: of all parameters in a row


def step_forward(flat: Tensor, mean: Tensor, x: Tensor, narrow: torch.dtype, config: str, *how: Any) -> list[Tensor]:
    """Return the image, and what backward reads: the weights, and what is kept."""
    steps = steps_of(config, x.device)
    buffers = steps.weights.gather(flat, narrow)
    result, *kept = steps.run(Steps.forward, options_of(*how), *buffers, mean, x)
    return [result, *buffers, *kept]


def step_fake(flat: Tensor, mean: Tensor, x: Tensor, narrow: torch.dtype, config: str, *how: Any) -> list[Tensor]:
    steps = steps_of(config, x.device)
    buffers = steps.weights.new_buffers(flat, narrow)
    with without_kernels():
        result, *kept = steps.forward(options_of(*how), *buffers, mean, x)
    return [result, *buffers, *kept]


def step_backward(dy: Tensor, x: Tensor, kept: list[Tensor], config: str, *how: Any) -> tuple[Tensor, Tensor]:
    wide, narrow, *kept = kept
    flat, *dx = steps_of(config, x.device).run(Steps.backward, options_of(*how), wide, narrow, x, dy, *kept)
    return flat, dx[0] if dx else x.new_empty(0)


def step_backward_fake(dy: Tensor, x: Tensor, kept: list[Tensor], config: str, *how: Any) -> tuple[Tensor, Tensor]:
    flat, wants_dx = kept[0].new_empty(steps_of(config, x.device).weights.count), options_of(*how).wants_dx
    return flat, empty_like(x) if wants_dx else x.new_empty(0)


def options_of(scale: int, img_range: float, recompute: str, wants_dx: bool) -> Options:
    return Options(scale, img_range, recompute, FIRST, wants_dx)


def _save(ctx: Any, inputs: tuple, output: list[Tensor]):
    flat, _, x, _, *ctx.how = inputs
    ctx.dtype = flat.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:])


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple:
    x, *kept = ctx.saved_tensors
    flat, dx = torch.ops.seemore_fast.network_step_backward(gradients[0], x, kept, *ctx.how)
    return flat.to(ctx.dtype), None, dx if ctx.how[-1] else None, None, *(None for _ in ctx.how)


HOW = "str config, int scale, float img_range, str recompute, bool wants_dx"
define(
    "network_step",
    f"(Tensor flat, Tensor mean, Tensor x, ScalarType narrow, {HOW}) -> Tensor[]",
    step_forward,
    step_fake,
)
define(
    "network_step_backward",
    f"(Tensor dy, Tensor x, Tensor[] kept, {HOW}) -> (Tensor, Tensor)",
    step_backward,
    step_backward_fake,
)
differentiate = partial(torch.library.register_autograd, lib=LIBRARY)
differentiate("seemore_fast::network_step", _differentiate, setup_context=_save)
differentiate("seemore_fast::network_step_backward", partial(refuse_second_derivative, "SeemoRe"))

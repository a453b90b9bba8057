"""Networks with fixed weights, the providers that run them, and expected results; for inference and training."""

import copy
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import seemore_fast
from seemore_fast.benchmarks import harness
from seemore_fast.network.config import PRESETS

Size = tuple[int, int]  # width, height
MAX_FLOAT64_PIXELS = 10**6  # beyond, float64 does not fit into memory, and the expected result is float32

T, B, L = ({"scale": 4, **PRESETS[name]} for name in "tbl")
T_X2 = {**T, "scale": 2}
TINY = {**T_X2, "num_layers": 2, "embedding_dim": 12}


def published() -> type | str:
    """Return the SeemoRe of PyPI's `seemore`, a port of the published code, or why it cannot be imported."""
    return harness.missing("seemore.module") or sys.modules["seemore.module"].SeemoRe


def seeded(config: dict) -> nn.Module:
    """Return the reference with random weights, except for the routers, whose choices no rounding can change.

    In group i, the logit of expert i % E is 2 and all others are 0, within about 1% for every random image.
    """
    torch.manual_seed(0)
    model = seemore_fast.reference.SeemoRe(**config).eval()

    def decide(group: int, gate: nn.Module, inputs: tuple[Tensor]):
        mean, weight = inputs[0].mean(dim=(2, 3)), gate.body[2].weight
        logits = 2.0 * (torch.arange(len(weight)) == group % len(weight))
        weight.copy_(logits[:, None] * mean / mean.square().sum())

    with torch.no_grad(), router_hooks(model, "register_forward_pre_hook", decide):
        model(image((64, 64)))
    return model


@contextmanager
def router_hooks(model: nn.Module, kind: str, callback: Callable):
    """Call callback(group, gate, ...) as a hook of every router."""
    gates = [group.local_block.block.moe_layer.gate for group in model.body]
    handles = [getattr(gate, kind)(partial(callback, group)) for group, gate in enumerate(gates)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def image(size: Size, seed: int = 1) -> Tensor:
    """Return a random image of values that bfloat16 has, too: no provider rounds its input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, size[1], size[0], generator=generator).bfloat16().float()


@torch.no_grad()
def solve(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return the expected output and the operations of convolutions and matrices, two for a multiply-add.

    Operations are those of the reference without the experts that were not chosen.
    """
    wide = torch.float64 if x[0, 0].numel() <= MAX_FLOAT64_PIXELS else torch.float32
    model, needless = copy.deepcopy(model).to(wide), 0

    def count(group: int, gate: nn.Module, inputs: tuple[Tensor], choice: tuple[Tensor, Tensor]):
        nonlocal needless
        ranks = torch.tensor(model.body[group].local_block.block.moe_layer.ranks, device=choice[0].device)
        left_out = (ranks.sum() - ranks[choice[0]].sum(dim=1)).sum().item()
        needless += 2 * 3 * left_out * inputs[0][0].numel()  # three matrices of rank x channels

    with router_hooks(model, "register_forward_hook", count), FlopCounterMode(display=False) as counter:
        y = model(x.to(wide))
    return y, counter.get_total_flops() - needless


def like(model: nn.Module, model_class: type = seemore_fast.SeemoRe) -> nn.Module:
    """Return a model of another class with the same weights, in evaluation mode."""
    other = model_class(**model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


# Inference


def eager(
    model: nn.Module,
    layout: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    compiler: dict | None = None,
) -> harness.Provider:
    """Return a provider of a model for images of `dtype`, or under autocast in it; compiled with `compiler`."""
    model.to(memory_format=layout)
    network = model if compiler is None else torch.compile(model, **compiler)

    @torch.inference_mode()
    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=autocast and dtype != torch.float32):
            y = network(x)
        return y if compiler is None else y.clone()  # the next run overwrites a CUDA graph's output

    def prepare(tensors: harness.InputSet) -> Callable:
        x = tensors["x"].contiguous(memory_format=layout)
        return partial(call, x if autocast else x.to(dtype))

    return prepare


def packed(model: nn.Module, graph: bool = False) -> harness.Provider:
    """Return a provider of our model with packed weights; with `graph`, it is captured before the check."""
    provider, is_prepared = eager(model), False

    def prepare(tensors: harness.InputSet) -> Callable:
        nonlocal is_prepared
        call = provider(tensors)
        if not is_prepared:
            model.prepare(graph=graph)
            for _ in range(2 * graph):  # a size is captured when it is repeated
                call()
            is_prepared = True
        return call

    return prepare


# Training


def training_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> list:
    """Run forward and backward of an L1 loss, under autocast for bfloat16; return the output and the gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, dtype, enabled=dtype == torch.bfloat16):
        y = model(x)
    F.l1_loss(y.float(), torch.zeros_like(y, dtype=torch.float32)).backward()
    return [y.detach(), [parameter.grad for parameter in model.parameters()]]


def saved_megabytes(step: Callable) -> float:
    """Return what autograd keeps from forward to backward of a step in MB: each storage once, without parameters."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 1e6

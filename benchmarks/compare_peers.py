"""Time inference: PyTorch, torch.compile, ONNX Runtime and OpenVINO beside this package; on a GPU, SPAN and SAFMN.

    seemore-fast benchmark inference        (or: python benchmarks/compare_peers.py)

All run in one process, in turns, on as many threads each; `published` is PyPI's `seemore`. A complete run writes
peers.json and a chart. With `--device cuda`, those take part that run there (`gpu_peers`).
"""

import argparse
import copy
import functools
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import seemore_fast
from seemore_fast.benchmarks import chart, command, gpu_peers, harness
from seemore_fast.network.presets import PRESETS

Size = tuple[int, int]  # width, height
ATOL = 1e-5  # the contract's for float32, beside twice eager PyTorch's error
WIDE = 10**6  # pixels up to which the truth is computed in float64; beyond it would not fit into memory: float32
PATIENCE = 40  # seconds for one provider in one table: bfloat16 where there are no instructions for it takes 20 a run
PAUSE = 0.15  # seconds between turns: ONNX Runtime's threads go on spinning for 0.05, in everybody else's way

# The network, the image and the truth


def seeded(config: dict) -> nn.Module:
    """Return the reference with random weights, but for the routers: no rounding can change what those choose.

    In group i, the logit of expert i % E is 2, all others are 0, within 1% or so at every random image.
    """
    torch.manual_seed(0)
    model = seemore_fast.reference.SeemoRe(**config).eval()

    def decide(group: int, gate: nn.Module, inputs: tuple[Tensor]):
        mean, weight = inputs[0].mean(dim=(2, 3)), gate.body[2].weight
        logits = 2.0 * (torch.arange(len(weight)) == group % len(weight))
        weight.copy_(logits[:, None] * mean / mean.square().sum())

    with torch.no_grad(), hooks(model, "register_forward_pre_hook", decide):
        model(image((64, 64)))
    return model


@contextmanager
def hooks(model: nn.Module, kind: str, function: Callable):
    """Call function(group, gate, ...) as a hook of every router."""
    gates = [group.local_block.block.moe_layer.gate for group in model.body]
    handles = [getattr(gate, kind)(partial(function, group)) for group, gate in enumerate(gates)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def image(size: Size) -> Tensor:
    """Return a random image of values that bfloat16 has, too, so that nobody rounds the input."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, size[1], size[0], generator=generator).bfloat16().float()


@torch.no_grad()
def solve(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return the right output and the operations of convolutions and matrices, two for a multiply-add.

    Counted in the reference, less the zeros with which it pads the chosen experts to the largest rank.
    """
    wide = torch.float64 if x[0, 0].numel() <= WIDE else torch.float32
    model, padding = copy.deepcopy(model).to(wide), 0

    def count(group: int, gate: nn.Module, inputs: tuple[Tensor], choice: tuple[Tensor, Tensor]):
        nonlocal padding
        ranks = torch.tensor(model.body[group].local_block.block.moe_layer.ranks, device=choice[0].device)
        zeros = (ranks.max() - ranks[choice[0]]).sum().item()
        padding += 2 * 3 * zeros * inputs[0].numel()  # three matrices of rank x channels

    with hooks(model, "register_forward_hook", count), FlopCounterMode(display=False) as counter:
        y = model(x.to(wide))
    return y, counter.get_total_flops() - padding


def like(model: nn.Module, model_class: type = seemore_fast.SeemoRe) -> nn.Module:
    """Return a model of another class with the same weights."""
    other = model_class(**model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


# Providers


def eager(model: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> harness.Provider:
    model.to(memory_format=layout)

    def prepare(tensors: harness.InputSet) -> Callable:
        x = tensors["x"].to(model.conv_2.weight.dtype).contiguous(memory_format=layout)
        return torch.inference_mode()(partial(model, x))

    return prepare


def compiled(model: nn.Module) -> harness.Provider:
    """Return a provider of torch.compile that may fold and pack the weights."""

    def prepare(tensors: harness.InputSet) -> Callable:
        from torch._inductor import config

        call = torch.no_grad()(partial(torch.compile(model), tensors["x"]))
        with config.patch(freezing=True):
            call()
        return call

    return prepare


def exporter(model: nn.Module, x: Tensor) -> Callable[[], bytes]:
    """Return a function that exports the model to ONNX, for images of the size of x, at its first call."""

    @functools.cache
    def export() -> bytes:
        for talkative in ("onnxscript", "torch.onnx"):
            logging.getLogger(talkative).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()

    return export


def onnx_runtime(export: Callable[[], bytes], threads: int) -> harness.Provider | str:
    def prepare(tensors: harness.InputSet) -> Callable:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(export(), settings, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: tensors["x"].numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return harness.missing("onnxscript") or harness.missing("onnxruntime") or prepare


@functools.cache
def openvino_core():
    """Return the one Core of this process.

    Each puts the stack for signal handlers where it wants it, and back where it was when it ends: of two that do not
    end in the reverse order, the second puts it where the first one had it, which is gone: the next signal ends the
    process.
    """
    from openvino import Core

    return Core()


def openvino(export: Callable[[], bytes], threads: int, precision: str) -> harness.Provider | str:
    """Return a provider of OpenVINO in "f32" or "bf16"."""
    absent = harness.missing("onnxscript") or harness.missing("openvino")
    if absent:
        return absent
    core = openvino_core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO knows no bf16 on this processor"
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}

    def prepare(tensors: harness.InputSet) -> Callable:
        request = core.compile_model(core.read_model(export()), "CPU", hints).create_infer_request()
        feed = {0: tensors["x"].numpy()}
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return prepare


def published(model: nn.Module, layout: torch.memory_format, autocast: bool = False) -> harness.Provider | str:
    found = harness.published()
    if isinstance(found, str):
        return found
    provider = eager(like(model, found), layout)
    return harness.inside(bf16_autocast, provider) if autocast else provider


def bf16_autocast():
    return torch.autocast("cpu", torch.bfloat16)


@contextmanager
def torch_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Tables


def peers(config: dict, size: Size, options) -> list[harness.Case]:
    """Return two cases, for one table: all that computes in float32, and all that computes in bfloat16.

    Those in bfloat16 may err twice as much as eager PyTorch under autocast on a small image, where it takes no minutes.
    """
    model, x, small = seeded(config), image(size), image((64, 64))
    y, operations = solve(model, x)
    rough = harness.inside(bf16_autocast, eager(model))({"x": small})()
    narrow_atol = 2 * harness.deviation(rough, solve(model, small)[0])
    export = exporter(model, x)
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    wide = {
        "seemore-fast fp32": eager(like(model)),
        **(lower_instruction_sets(model) if options.instruction_sets else {}),
        "OpenVINO fp32": openvino(export, options.threads, "f32"),
        "ONNX Runtime": onnx_runtime(export, options.threads),
        "published eager": published(model, contiguous),
        "published channels_last": published(model, channels_last),
        "reference eager": eager(copy.deepcopy(model), contiguous),
        "reference eager channels_last": eager(copy.deepcopy(model), channels_last),
    }
    if options.compile:
        wide["reference torch.compile, frozen"] = compiled(copy.deepcopy(model))
    narrow = {
        "seemore-fast bf16": eager(like(model).bfloat16()),
        "OpenVINO bf16": openvino(export, options.threads, "bf16"),
        "published bf16 autocast": published(model, channels_last, autocast=True),
    }
    case = partial(harness.Case, inputs=[{"x": x}], truth=[y], operations=operations, kernels_only=False)
    case = partial(case, pause=PAUSE, patience=PATIENCE)
    return [case(wide, yardstick="reference eager", atol=ATOL), case(narrow, yardstick=(), atol=narrow_atol)]


def lower_instruction_sets(model: nn.Module) -> dict[str, harness.Provider]:
    cpu = seemore_fast.backend_info()["cpu"]
    names = [name for name in cpu.get("instruction_sets", []) if name != cpu["instruction_set"]]
    forced = {name: partial(harness.instruction_set, name) for name in names}
    return {f"seemore-fast fp32 {name}": harness.inside(forced[name], eager(like(model))) for name in names}


def growth(config: dict, sizes: list[Size], options) -> list[harness.Case]:
    """Return a case of each size, for one table of time per pixel and of memory."""
    model, cases = seeded(config), []
    for width, height in sizes:
        x, memory = image((width, height)), {}
        y, operations = solve(model, x)
        providers = {harness.OURS: eager(like(model))}
        if width * height <= WIDE:  # beyond it, they take minutes
            providers["published channels_last"] = published(model, torch.channels_last)
        providers = {f"{name} {width}x{height}": provider for name, provider in providers.items()}
        cases.append(
            harness.Case(
                {name: harness.weighed(name, provider, memory) for name, provider in providers.items()},
                *([{"x": x}], [y], (), ATOL),
                operations=operations,
                pixels=width * height,
                kernels_only=False,
                patience=PATIENCE,
                more=memory,
            )
        )
    return cases


def scaling(config: dict, size: Size, options) -> harness.Case:
    """Return the case of one thread against two."""
    model, x = seeded(config), image(size)
    y, operations = solve(model, x)
    providers, cores = {}, os.cpu_count()
    for count, name in ((1, "seemore-fast, 1 thread"), (2, "seemore-fast, 2 threads")):
        there = harness.inside(partial(torch_threads, count), eager(like(model)))
        providers[name] = there if count <= cores else f"this machine has {cores} core"
    return harness.Case(providers, [{"x": x}], [y], (), ATOL, operations=operations, kernels_only=False)


T, B, L = ({"scale": 4, **PRESETS[name]} for name in "tbl")
TINY = {**T, "scale": 2, "num_layers": 2, "embedding_dim": 12}


def on_gpu(config: dict, size: Size, dtype: torch.dtype) -> Callable:
    """Return what builds a table of the peers on a GPU."""
    return partial(gpu_peers.inference, seeded, solve, like, config, size, dtype)


CASES = {
    "cpu": {
        "T x4 320x180": partial(peers, T, (320, 180)),
        "T x2 640x360": partial(peers, {**T, "scale": 2}, (640, 360)),
        "B x4 320x180": partial(peers, B, (320, 180)),
        "L x4 320x180": partial(peers, L, (320, 180)),
        "growth T x4": partial(growth, T, [(320, 180), (160, 90), (640, 360), (1280, 720), (2464, 1632)]),
        "threads T x4 320x180": partial(scaling, T, (320, 180)),
    },
    "cuda": {
        "T x4 640x480 bf16": on_gpu(T, (640, 480), torch.bfloat16),
        "T x4 320x180 fp16": on_gpu(T, (320, 180), torch.float16),
        "L x4 640x480 bf16": on_gpu(L, (640, 480), torch.bfloat16),
        "T x4 640x480 fp16": on_gpu(T, (640, 480), torch.float16),
        "T x4 640x480 fp32": on_gpu(T, (640, 480), torch.float32),
    },
    "quick": {
        "tiny 40x32": partial(peers, TINY, (40, 32)),
        "growth tiny": partial(growth, TINY, [(40, 32), (80, 64)]),
        "threads tiny 40x32": partial(scaling, TINY, (40, 32)),
        "on a GPU tiny 40x32 bf16": on_gpu(TINY, (40, 32), torch.bfloat16),
    },
}


def build(case: Callable, device: torch.device, options) -> harness.Case | list[harness.Case]:
    is_for_gpus = case.func is gpu_peers.inference
    return case(device, options) if is_for_gpus else case(options)


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile")
    command.run("peers", parser, CASES, build, chart.draw, arguments)


if __name__ == "__main__":
    main()

"""Time inference: PyTorch, torch.compile, ONNX Runtime and OpenVINO beside this package; on a GPU, SPAN and SAFMN.

    seemore-fast benchmark inference        (or: python benchmarks/inference.py)

All run in one process, in turns, with the same number of threads; `published` is PyPI's `seemore`. A complete run
writes peers.json and a chart. `--device cuda` compares what runs on a GPU. SPAN and SAFMN come from the package
spandrel, if it is installed, with random weights: they are compared with their own float32 results.
"""

import copy
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import seemore_fast
from seemore_fast.benchmarks import charts, command, harness, runtimes
from seemore_fast.benchmarks.machine import grown_megabytes
from seemore_fast.benchmarks.network import (
    MAX_FLOAT64_PIXELS,
    T_X2,
    TINY,
    B,
    L,
    Size,
    T,
    eager,
    image,
    like,
    packed,
    published,
    seeded,
    solve,
)  # fmt: skip

ATOL = 1e-5  # for float32, in addition to 2x the error of eager PyTorch
CPU_TIMEOUT, GPU_TIMEOUT = 40, 30  # seconds per provider and table: bfloat16 without instructions for it takes 20 a run
PAUSE = 0.15  # seconds between calls: ONNX Runtime's threads go on spinning for 0.05
COMPILERS = {"torch.compile": {}, "torch.compile, max-autotune": {"mode": "max-autotune"}}  # the second has CUDA graphs
SPANDREL = {  # the class of each module and its arguments for scale 4
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 48, "upscale": 4},
    "SAFMN": {"dim": 36, "n_blocks": 8, "ffn_scale": 2.0, "upscaling_factor": 4},
}
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def published_like(model: nn.Module, *arguments, **options) -> harness.Provider | str:
    """Return a provider of PyPI's `seemore` with a model's weights; see `network.eager`."""
    found = published()
    if isinstance(found, str):
        return found
    device = next(model.parameters()).device
    return eager(like(model, found).to(device), *arguments, **options)


# Tables on a CPU


def peers(config: dict, size: Size, device: torch.device, options) -> list[harness.Case]:
    """Return two cases for one table: the providers that compute in float32, and those that compute in bfloat16.

    The latter may have 2x the error of eager PyTorch under autocast for a small image, where it takes no minutes.
    """
    model, x, small = seeded(config), image(size), image((64, 64))
    y, operations = solve(model, x)
    bf16_autocast = {"dtype": torch.bfloat16, "autocast": True}
    rough = eager(model, **bf16_autocast)({"x": small})()
    narrow_atol = 2 * harness.deviation(rough, solve(model, small)[0])
    export = runtimes.exporter(model, x)
    wide = {
        "seemore-fast fp32": eager(like(model)),
        **(lower_instruction_sets(model) if options.instruction_sets else {}),
        "OpenVINO fp32": runtimes.openvino(export, options.threads, "f32"),
        "ONNX Runtime": runtimes.onnx_runtime(export, options.threads),
        "published eager": published_like(model, CONTIGUOUS),
        "published channels_last": published_like(model, CHANNELS_LAST),
        "reference eager": eager(copy.deepcopy(model), CONTIGUOUS),
        "reference eager channels_last": eager(copy.deepcopy(model), CHANNELS_LAST),
    }
    if options.compile:
        wide["reference torch.compile, frozen"] = runtimes.compiled(copy.deepcopy(model))
    narrow = {
        "seemore-fast bf16": eager(like(model).bfloat16(), dtype=torch.bfloat16),
        "OpenVINO bf16": runtimes.openvino(export, options.threads, "bf16"),
        "published bf16 autocast": published_like(model, CHANNELS_LAST, **bf16_autocast),
    }
    case = partial(harness.Case, inputs=[{"x": x}], expected=[y], operations=operations, kernels_only=False)
    case = partial(case, pause=PAUSE, timeout=CPU_TIMEOUT)
    return [case(wide, baseline="reference eager", atol=ATOL), case(narrow, baseline=(), atol=narrow_atol)]


def lower_instruction_sets(model: nn.Module) -> dict[str, harness.Provider]:
    cpu = seemore_fast.backend_info()["cpu"]
    names = [name for name in cpu.get("instruction_sets", []) if name != cpu["instruction_set"]]
    forced = {name: partial(harness.instruction_set, name) for name in names}
    return {f"seemore-fast fp32 {name}": harness.inside(forced[name], eager(like(model))) for name in names}


def growth(config: dict, sizes: list[Size], device: torch.device, options) -> list[harness.Case]:
    """Return a case for each size, for one table of time per pixel and of memory."""
    model, cases = seeded(config), []
    for width, height in sizes:
        x, figures = image((width, height)), {}
        y, operations = solve(model, x)
        providers = {harness.OURS: eager(like(model))}
        if width * height <= MAX_FLOAT64_PIXELS:  # beyond, it takes minutes
            providers["published channels_last"] = published_like(model, CHANNELS_LAST)
        providers = {f"{name} {width}x{height}": provider for name, provider in providers.items()}
        cases.append(
            harness.Case(
                {name: weighed(name, provider, figures) for name, provider in providers.items()},
                *([{"x": x}], [y], (), ATOL),
                operations=operations,
                pixels=width * height,
                kernels_only=False,
                timeout=CPU_TIMEOUT,
                figures=figures,
            )
        )
    return cases


def weighed(name: str, provider: harness.Provider | str, figures: dict[str, dict]) -> harness.Provider | str:
    """Return a provider that adds the memory of a call to figures[name] when it is prepared."""

    def prepare(tensors: harness.InputSet) -> Callable:
        call = provider(tensors)
        call()  # the first call loads what it needs
        figures[name] = {"step_mb": grown_megabytes(call)}
        return call

    return provider if isinstance(provider, str) else prepare


def scaling(config: dict, size: Size, device: torch.device, options) -> harness.Case:
    """Return the case of one thread and of two."""
    model, x = seeded(config), image(size)
    y, operations = solve(model, x)
    providers, cores = {}, os.cpu_count()
    for count, name in ((1, "seemore-fast, 1 thread"), (2, "seemore-fast, 2 threads")):
        provider = harness.inside(
            partial(harness.setting, torch.get_num_threads, torch.set_num_threads, count), eager(like(model))
        )
        providers[name] = provider if count <= cores else f"this machine has {cores} core"
    return harness.Case(providers, [{"x": x}], [y], (), ATOL, operations=operations, kernels_only=False)


# Tables on a GPU


def gpu_peers(config: dict, size: Size, dtype: torch.dtype, device: torch.device, options) -> list[harness.Case]:
    """Return the cases of one table for random images, a batch of one: SeemoRe, and other networks in float16."""
    model = seeded(config).to(device)
    most = 2 if options.quick else harness.MAX_SETS
    inputs = harness.input_sets(lambda seed: {"x": image(size, seed).to(device)}, device, most)
    y, operations = solve(model, inputs[0]["x"])

    def ours() -> nn.Module:
        return like(model).to(device)

    def reference() -> nn.Module:
        return like(model, seemore_fast.reference.SeemoRe).to(device)

    in_dtype = {"dtype": dtype, "autocast": True}
    compilers = {name: {"dynamic": False, **how} for name, how in COMPILERS.items() if options.compile}
    providers = {
        harness.OURS: packed(ours().to(dtype)),
        f"{harness.OURS} autocast": eager(ours(), **in_dtype),
        "reference eager": eager(reference(), **in_dtype),
        "published eager": published_like(model, CONTIGUOUS, **in_dtype),
        "published channels_last": published_like(model, CHANNELS_LAST, **in_dtype),
    }
    for name, compiler in compilers.items():
        providers[f"published {name}"] = published_like(model, **in_dtype, compiler=compiler)
    if device.type == "cuda":
        providers[harness.OURS + harness.IN_A_GRAPH] = packed(ours().to(dtype), graph=True)
    for name, compiler in compilers.items():
        providers[f"reference {name}"] = eager(reference(), **in_dtype, compiler=compiler)
    atol = ATOL if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    case = harness.Case(
        providers, inputs, [y], "reference eager", atol, operations=operations, kernels_only=False,
        timeout=GPU_TIMEOUT, images=1, precision=harness.SHORT[dtype],
    )  # fmt: skip
    with_others = config["scale"] == 4 and dtype != torch.float32
    return [case, *(other_network(name, inputs, device) for name in SPANDREL if with_others)]


def other_network(name: str, inputs: list[harness.InputSet], device: torch.device) -> harness.Case:
    """Return the case of a network of spandrel in float16."""
    absent = harness.missing(f"spandrel.architectures.{name}")
    if absent or device.type != "cuda":
        return harness.Case({f"{name} fp16": absent or "needs a GPU"}, inputs, [], (), 0)
    torch.manual_seed(0)
    module = __import__(f"spandrel.architectures.{name}", fromlist=[name])
    model = getattr(module, name)(**SPANDREL[name]).to(device).eval()
    y = eager(model)(inputs[0])().float()
    for layer in model.modules():  # SPAN folds its weights at every call: once is enough
        if hasattr(layer, "update_params"):
            layer.update_params = lambda: None
    half = model.half()

    @torch.inference_mode()
    def call(x: torch.Tensor) -> torch.Tensor:
        return half(x.half())

    provider = {f"{name} fp16": lambda tensors: partial(call, tensors["x"])}
    return harness.Case(provider, inputs, [y], (), 0.1, kernels_only=False, images=1)


CASES = {
    "cpu": {
        "T x4 320x180": partial(peers, T, (320, 180)),
        "T x2 640x360": partial(peers, T_X2, (640, 360)),
        "B x4 320x180": partial(peers, B, (320, 180)),
        "L x4 320x180": partial(peers, L, (320, 180)),
        "growth T x4": partial(growth, T, [(320, 180), (160, 90), (640, 360), (1280, 720), (2464, 1632)]),
        "threads T x4 320x180": partial(scaling, T, (320, 180)),
    },
    "cuda": {
        "T x4 640x480 bf16": partial(gpu_peers, T, (640, 480), torch.bfloat16),
        "T x4 320x180 fp16": partial(gpu_peers, T, (320, 180), torch.float16),
        "L x4 640x480 bf16": partial(gpu_peers, L, (640, 480), torch.bfloat16),
        "T x4 640x480 fp16": partial(gpu_peers, T, (640, 480), torch.float16),
        "T x4 640x480 fp32": partial(gpu_peers, T, (640, 480), torch.float32),
    },
    "quick": {
        "tiny 40x32": partial(peers, TINY, (40, 32)),
        "growth tiny": partial(growth, TINY, [(40, 32), (80, 64)]),
        "threads tiny 40x32": partial(scaling, TINY, (40, 32)),
        "on a GPU tiny 40x32 bf16": partial(gpu_peers, TINY, (40, 32), torch.bfloat16),
    },
}


def build(table: Callable, device: torch.device, options) -> harness.Case | list[harness.Case]:
    return table(device=device, options=options)


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    command.add_options(parser, device="cpu", compile=True)
    command.run("peers", parser, CASES, build, arguments, charts.draw)


if __name__ == "__main__":
    main()

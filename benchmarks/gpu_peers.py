"""Who takes part in `compare_peers` on a GPU: the published code in every way that torch runs it, SPAN and SAFMN.

SPAN and SAFMN come from the package spandrel, where it is installed, with random weights: what they give is compared
with what they give in float32, since only their times are of interest.
"""

from functools import partial

import torch
from torch import nn

import seemore_fast
from seemore_fast.benchmarks import harness

COMPILED = {"torch.compile": {}, "torch.compile, max-autotune": {"mode": "max-autotune"}}  # the second with CUDA graphs
PATIENCE = 30  # seconds that one provider may take in all its turns
OTHERS = {  # spandrel's module, class and its arguments for scale 4
    "SPAN": ("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 48, "upscale": 4}),
    "SAFMN": ("SAFMN", {"dim": 36, "n_blocks": 8, "ffn_scale": 2.0, "upscaling_factor": 4}),
}


def cast(dtype: torch.dtype, device: torch.device):
    """Return the context in which peers compute in `dtype`: autocast, or none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def ours(model: nn.Module, dtype: torch.dtype, graph: bool = False) -> harness.Provider:
    """Return a provider of our model in `dtype`, with frozen weights; in a graph, it is captured before the check."""

    @torch.inference_mode()
    def call(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    def prepare(tensors: harness.InputSet):
        if not model._frozen:
            model.prepare(graph=graph)
            for _ in range(2 * graph):  # a size is captured when it comes again
                call(tensors["x"])
        return partial(call, tensors["x"])

    model.to(dtype).eval()
    return prepare


def peer(model: nn.Module, dtype: torch.dtype, device: torch.device, layout=torch.contiguous_format, **compiler):
    """Return a provider of a network of torch's own operators, under autocast; compiled with `compiler`, if given."""
    model.eval().to(memory_format=layout)
    network = torch.compile(model, **compiler) if compiler else model

    @torch.inference_mode()
    def call(x: torch.Tensor) -> torch.Tensor:
        with cast(dtype, device):
            y = network(x)
        return y.clone() if compiler else y  # a CUDA graph's output is overwritten by the next run

    return lambda tensors: partial(call, tensors["x"].contiguous(memory_format=layout))


def published(like, dtype: torch.dtype, device: torch.device, compile: bool) -> dict[str, harness.Provider | str]:
    """Return PyPI's `seemore` in every way that torch runs it; like(class) makes a model with the right weights."""
    found, names = harness.published(), ["published eager", "published channels_last"]
    names += [f"published {how}" for how in COMPILED if compile]
    if isinstance(found, str):
        return dict.fromkeys(names, found)
    ways = [{}, {"layout": torch.channels_last}, *({"dynamic": False, **how} for how in COMPILED.values())]
    return {name: peer(like(found), dtype, device, **way) for name, way in zip(names, ways, strict=False)}


def others(inputs: list[harness.InputSet], device: torch.device) -> list[harness.Case]:
    """Return a case of each of the other networks, in float16."""
    cases = []
    for name, (folder, arguments) in OTHERS.items():
        absent = harness.missing(f"spandrel.architectures.{folder}")
        if absent or device.type != "cuda":
            cases.append(harness.Case({f"{name} fp16": absent or "needs a GPU"}, inputs, [], (), 0))
            continue
        torch.manual_seed(0)
        module = __import__(f"spandrel.architectures.{folder}", fromlist=[name])
        model = getattr(module, name)(**arguments).to(device).eval()
        with torch.inference_mode():
            y = model(inputs[0]["x"])
        for layer in model.modules():  # SPAN folds its weights at every call: once is enough
            if hasattr(layer, "update_params"):
                layer.update_params = lambda: None
        cases.append(
            harness.Case({f"{name} fp16": in_half(model)}, inputs, [y.float()], (), 0.1, kernels_only=False, images=1)
        )
    return cases


def in_half(model: nn.Module) -> harness.Provider:
    model.half()

    @torch.inference_mode()
    def call(x: torch.Tensor) -> torch.Tensor:
        return model(x.half())

    return lambda tensors: partial(call, tensors["x"])


def inference(seeded, solve, like, config: dict, size: tuple[int, int], dtype: torch.dtype, device, options):
    """Return the cases of one table, for random images of `size` (width, height), a batch of one."""
    model = seeded(config).to(device)

    def make(seed: int) -> harness.InputSet:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(1, config.get("in_chans", 3), size[1], size[0], generator=generator)
        return {"x": x.bfloat16().float().to(device)}

    inputs = harness.input_sets(make, device)
    y, operations = solve(model, inputs[0]["x"])

    def load(model_class: type = seemore_fast.SeemoRe) -> nn.Module:
        return like(model, model_class).to(device)

    providers = {
        harness.OURS: ours(load(), dtype),
        f"{harness.OURS} autocast": peer(load(), dtype, device),
        "reference eager": peer(load(seemore_fast.reference.SeemoRe), dtype, device),
        **published(load, dtype, device, options.compile),
    }
    if device.type == "cuda":
        providers[harness.OURS + harness.IN_A_GRAPH] = ours(load(), dtype, graph=True)
    if options.compile:
        for name, how in COMPILED.items():
            compiled = peer(load(seemore_fast.reference.SeemoRe), dtype, device, dynamic=False, **how)
            providers[f"reference {name}"] = compiled
    atol = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    case = harness.Case(
        providers, inputs, [y], "reference eager", atol, operations=operations, kernels_only=False, patience=PATIENCE,
        images=1, kind=harness.SHORT[dtype],
    )  # fmt: skip
    return [case, *(others(inputs, device) if config["scale"] == 4 and dtype != torch.float32 else [])]

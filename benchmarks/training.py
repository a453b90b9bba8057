"""Time training steps of the network: the published code and this package, eager, compiled and under autocast.

    seemore-fast benchmark training                     (or: python benchmarks/training.py)
    seemore-fast benchmark training --device cuda

A step is forward, an L1 loss and backward, without an optimizer; its output and all gradients are checked. All run in
one process, in turns, with the same number of threads. On a CPU, a turn is two steps of which the second one counts: in
a training, a step finds the memory of the previous one. `published` is PyPI's `seemore`, `reference` this package's
plain model. saved_mb: what autograd keeps from forward to backward, each storage once, without parameters. step_mb: the
largest growth of resident memory in a step. A complete run writes training.json.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

import seemore_fast
from seemore_fast.benchmarks import command, harness
from seemore_fast.benchmarks.machine import grown_megabytes
from seemore_fast.benchmarks.network import T_X2, TINY, B, published, saved_megabytes, training_step

CPU_TIMEOUT = 120  # seconds per provider and table: a compiled step takes ten
# In addition to 2x the error of eager PyTorch, for images in [0, 1]: a few steps of 8 bits for bfloat16
ATOL = {torch.float32: 1e-5, torch.bfloat16: 0.02}
LAYOUTS = {"eager": torch.contiguous_format, "channels_last": torch.channels_last}


class Setting(NamedTuple):
    config: dict
    batch: int
    size: int
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


CASES = {
    "cuda": {
        "training T x2 32x64x64 bf16": Setting(T_X2, 32, 64, (torch.bfloat16,)),
        "training T x2 32x64x64 fp32": Setting(T_X2, 32, 64, (torch.float32,)),
    },
    "cpu": {"T x2 8x64x64": Setting(T_X2, 8, 64), "B x4 4x48x48": Setting(B, 4, 48)},
    "quick": {"tiny 2x16x16": Setting(TINY, 2, 16)},
}


def models_of(plain: nn.Module, precision: str, device: torch.device, compile: bool) -> dict[str, nn.Module | str]:
    """Return models with the same weights by name; `precision`, if any, is part of the name."""

    def load(model_class: type, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
        model = model_class(**plain.config)
        model.load_state_dict(plain.state_dict())
        return model.train().to(device=device, memory_format=layout)

    ours = " ".join(filter(None, [harness.OURS, precision]))
    found, on_gpu = {ours: load(seemore_fast.SeemoRe)}, device.type == "cuda"
    for recompute in ("none", "block") if on_gpu else ():
        model = found[f"{ours}, recompute={recompute}"] = load(seemore_fast.SeemoRe)
        model.recompute = recompute
    for origin, model_class in (("reference", seemore_fast.reference.SeemoRe), ("published", published())):
        name = " ".join(filter(None, [origin, precision]))
        absent = isinstance(model_class, str) and model_class
        for how, layout in LAYOUTS.items():
            if how == "eager" or not on_gpu or origin == "published":
                found[f"{name} {how}"] = absent or load(model_class, layout)
        if compile and (on_gpu or origin == "published"):
            found[f"{name} torch.compile"] = absent or torch.compile(load(model_class))
    return found


def providers_of(models: dict[str, nn.Module | str], dtype: torch.dtype, device: torch.device, figures: dict) -> dict:
    """Return providers of a training step in `dtype` by name; on a CPU, `figures` gets the memory of each one."""

    def provider(name: str, model: nn.Module):
        layout = LAYOUTS["channels_last" if name.endswith("channels_last") else "eager"]

        def prepare(tensors: harness.InputSet):
            step = partial(training_step, model, tensors["x"].contiguous(memory_format=layout), dtype)
            if device.type == "cpu" and not name.endswith("compile"):  # compiled code does not call the hooks
                saved = saved_megabytes(step)  # the first step, which loads what it needs
                figures[name] = {"saved_mb": saved, "step_mb": grown_megabytes(step)}
            return step

        return prepare

    found = {name: model if isinstance(model, str) else provider(name, model) for name, model in models.items()}
    if device.type == "cuda":  # the whole step in a graph
        ours = next(iter(found))
        found[ours + harness.IN_A_GRAPH] = harness.in_a_graph(found[ours])
    return found


def build(setting: Setting, device: torch.device, options) -> list[harness.Case]:
    """Return a case for each dtype of a table; bfloat16 runs under autocast."""
    torch.manual_seed(0)
    plain = seemore_fast.reference.SeemoRe(**setting.config)
    shape = setting.batch, setting.config.get("in_chans", 3), setting.size, setting.size
    sets = (
        2 if device.type == "cuda" else 1
    )  # a step fills every cache by itself, and each set's graph holds its memory
    inputs = [{"x": torch.rand(shape).to(device)} for _ in range(sets)]
    cases = []
    for dtype in setting.dtypes:
        precision, figures = harness.SHORT[dtype] if len(setting.dtypes) > 1 else "", {}
        models = models_of(plain, precision, device, options.compile)
        providers = providers_of(models, dtype, device, figures)
        baseline = " ".join(filter(None, ["reference", precision, "eager"]))
        cases.append(harness.Case(providers, inputs, [], baseline, ATOL[dtype], kernels_only=False, figures=figures))
    if device.type == "cpu":
        cases = [dataclasses.replace(case, discard_first=True, timeout=CPU_TIMEOUT) for case in cases]
    expected = training_step(plain.double().to(device).train(), inputs[0]["x"].double(), torch.float64)
    return [dataclasses.replace(case, expected=expected) for case in cases]


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    command.add_options(parser, device="cpu")
    command.run("training", parser, CASES, build, arguments)


if __name__ == "__main__":
    main()

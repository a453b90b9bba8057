"""Time training steps on a CPU: the published code eager, channels_last, under autocast, compiled, beside this package.

    seemore-fast benchmark training         (or: python benchmarks/compare_training.py)

A step is forward, an L1 loss and backward, without an optimizer; it is checked by its output and all gradients. All run
in one process, in turns, on as many threads each; of two steps in a turn the second counts, as in a training, where a
step finds the memory of the one before. `published` is PyPI's `seemore`, `reference` this package's plain model.
saved_mb: what autograd keeps from forward to backward, each storage once, the parameters' not. step_mb: by how much the
resident memory grows in a step at most. A complete run writes training.json.
"""

import argparse
import dataclasses
from functools import partial
from typing import NamedTuple

import torch

import seemore_fast
from seemore_fast.benchmarks import command, harness
from seemore_fast.benchmarks.bench_model import ATOL, training_step
from seemore_fast.network.presets import PRESETS

PATIENCE = 120  # seconds for one provider in one table: a compiled step takes ten


class Setting(NamedTuple):
    config: dict
    batch: int
    size: int


T, B = ({"scale": scale, **PRESETS[name]} for name, scale in (("t", 2), ("b", 4)))
TINY = {**T, "num_layers": 2, "embedding_dim": 12}
CASES = {
    "cpu": {"T x2 8x64x64": Setting(T, 8, 64), "B x4 4x48x48": Setting(B, 4, 48)},
    "quick": {"tiny 2x16x16": Setting(TINY, 2, 16)},
}


def saved_megabytes(step) -> float:
    """Return what autograd keeps of a step, in MB: every storage once."""
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 1e6


def providers_of(config: dict, weights: dict, dtype: torch.dtype, compile: bool, figures: dict) -> dict:
    """Return name -> provider of a training step in `dtype`; `figures` gets what each keeps in memory."""

    def load(model_class, layout=torch.contiguous_format):
        model = model_class(**config)
        model.load_state_dict(weights)
        return model.train().to(memory_format=layout)

    def provider(name: str, model, layout=torch.contiguous_format):
        def prepare(tensors: harness.InputSet):
            step = partial(training_step, model, tensors["x"].contiguous(memory_format=layout), dtype)
            if name not in figures and not name.endswith("compile"):  # whose hooks are not called
                saved = saved_megabytes(step)  # the first step, which loads what it needs
                figures[name] = {"saved_mb": saved, "step_mb": harness.grown_megabytes(step)}
            return step

        return prepare

    kind, published = harness.SHORT[dtype], harness.published()
    last, plain = torch.channels_last, seemore_fast.reference.SeemoRe
    models = {f"{harness.OURS} {kind}": (load(seemore_fast.SeemoRe),)}
    models[f"reference {kind} eager"] = (load(plain),)
    models[f"reference {kind} channels_last"] = (load(plain, last), last)
    names = {"eager": torch.contiguous_format, "channels_last": last}
    found = {name: provider(name, *model) for name, model in models.items()}
    for how, layout in names.items():
        name = f"published {kind} {how}"
        found[name] = published if isinstance(published, str) else provider(name, load(published, layout), layout)
    if compile:
        name = f"published {kind} torch.compile"
        found[name] = published if isinstance(published, str) else provider(name, torch.compile(load(published)))
    return found


def build(setting: Setting, device: torch.device, options) -> list[harness.Case]:
    """Return two cases for one table: float32, and bfloat16 under autocast."""
    torch.manual_seed(0)
    truth_model = seemore_fast.reference.SeemoRe(**setting.config)
    weights = {name: tensor.clone() for name, tensor in truth_model.state_dict().items()}
    x = torch.rand(setting.batch, setting.config.get("in_chans", 3), setting.size, setting.size)
    truth = training_step(truth_model.double().train(), x.double(), torch.float64)
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        more = {}
        found = providers_of(setting.config, weights, dtype, options.compile, more)
        yardstick = f"reference {harness.SHORT[dtype]} eager"
        case = harness.Case(found, [{"x": x}], truth, yardstick, ATOL[dtype], kernels_only=False, more=more)
        cases.append(dataclasses.replace(case, first_is_lost=True, patience=PATIENCE))
    return cases


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="time torch.compile")
    command.run("training", parser, CASES, build, arguments=arguments)


if __name__ == "__main__":
    main()

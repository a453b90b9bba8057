"""Time a training step of the whole network against eager PyTorch and torch.compile; on the CPU, inference, too.

    python benchmarks/bench_model.py --device cuda

A step is forward and backward, without an optimizer; it is checked by its output and all gradients. Inference on a GPU
is timed by `compare_peers.py --device cuda`.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import seemore_fast
from seemore_fast.benchmarks import command, harness, operators
from seemore_fast.network.presets import PRESETS


class Setting(NamedTuple):
    preset: str
    scale: int
    batch: int
    height: int
    width: int
    dtype: torch.dtype = torch.float32
    training: bool = False


CASES = {
    "cuda": {
        "training T x2 32x64x64 bf16": Setting("t", 2, 32, 64, 64, torch.bfloat16, training=True),
        "training T x2 32x64x64 fp32": Setting("t", 2, 32, 64, 64, training=True),
    },
    "cpu": {
        "inference T x4 320x180 fp32": Setting("t", 4, 1, 180, 320),
        "training T x2 8x64x64 fp32": Setting("t", 2, 8, 64, 64, training=True),
    },
    "quick": {
        "inference T x2 32x32 fp32": Setting("t", 2, 1, 32, 32),
        "training T x2 2x16x16 fp32": Setting("t", 2, 2, 16, 16, training=True),
    },
}
# Beside twice eager's error, for images in [0, 1]: the contract's for float32, a few steps of 8 bits for bfloat16.
ATOL = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def models(config: dict, weights: dict, device: torch.device, compile: bool, training: bool) -> dict:
    """Return name -> module with the same weights, or a text that says why it is absent."""

    def load(model_class, **attributes):
        model = model_class(**config)
        model.load_state_dict(weights)
        for name, value in attributes.items():
            setattr(model, name, value)
        return model.to(device)

    found = {harness.OURS: load(seemore_fast.SeemoRe)}
    for how in ("none", "block") if training else ():
        found[f"{harness.OURS}, recompute={how}"] = load(seemore_fast.SeemoRe, recompute=how)
    found["reference eager"] = load(seemore_fast.reference.SeemoRe)
    if compile:
        found["reference torch.compile"] = torch.compile(load(seemore_fast.reference.SeemoRe))
    published, names = harness.published(), ["published eager", "published channels_last", "published torch.compile"]
    if isinstance(published, str):
        return found | dict.fromkeys(names[: 2 + compile], published)
    found["published eager"] = load(published)
    found["published channels_last"] = load(published).to(memory_format=torch.channels_last)
    if compile:
        found["published torch.compile"] = torch.compile(load(published))
    return found


def inference(model, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run a forward pass, under autocast for bfloat16."""
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype == torch.bfloat16):
        return model(x)


def training_step(model, x: torch.Tensor, dtype: torch.dtype) -> list:
    """Run forward and backward of an L1 loss; return the output and the gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, dtype, enabled=dtype == torch.bfloat16):
        y = model(x)
    F.l1_loss(y.float(), torch.zeros_like(y, dtype=torch.float32)).backward()
    return [y.detach(), [parameter.grad for parameter in model.parameters()]]


def build(setting: Setting, device: torch.device, options) -> harness.Case:
    config = {"scale": setting.scale, **PRESETS[setting.preset]}
    torch.manual_seed(0)
    truth_model = seemore_fast.reference.SeemoRe(**config)
    weights = {name: tensor.clone() for name, tensor in truth_model.state_dict().items()}
    step = training_step if setting.training else inference

    def provider(model, dtype: torch.dtype = setting.dtype):
        if isinstance(model, str):
            return model
        model.train(setting.training)
        layout = harness.memory_format(model)
        return lambda tensors: partial(step, model, tensors["x"].contiguous(memory_format=layout), dtype)

    def make(seed: int) -> harness.InputSet:
        return {"x": torch.rand(setting.batch, 3, setting.height, setting.width).to(device)}

    # What a step keeps fills every cache by itself; each set has a graph, which holds a step's memory.
    inputs = harness.input_sets(make, device, 2 if setting.training else None)
    wide = {"x": inputs[0]["x"].double()}
    truth = harness.as_list(provider(truth_model.double().to(device), torch.float64)(wide)())
    found = models(config, weights, device, options.compile, setting.training)
    providers = {name: provider(model) for name, model in found.items()}
    if device.type == "cuda":  # the whole step
        providers[harness.OURS + harness.IN_A_GRAPH] = operators.in_a_graph(providers[harness.OURS])
    return harness.Case(providers, inputs, truth, "reference eager", ATOL[setting.dtype], kernels_only=False)


if __name__ == "__main__":
    command.main("model", __doc__, CASES, build, compiled=True)

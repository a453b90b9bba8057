"""Time pointwise, with its residual, against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_pointwise.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators


def operations(setting: operators.Setting) -> int:
    """Count those of the product, two for a multiply-add; backward has dx and dweight."""
    products = {"forward": 1, "backward": 2, "both": 3}[setting.mode]
    return products * 2 * setting.shape[1] * torch.Size(setting.shape).numel()


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    channels = setting.shape[1]
    images = {"x": setting.shape, "residual": setting.shape}
    parameters = {"weight": (channels, channels, 1, 1), "bias": (channels,)}
    return operators.build("pointwise", setting, images, parameters, device, arguments, operations(setting))


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("pointwise", __doc__, CASES, build)

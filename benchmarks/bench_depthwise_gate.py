"""Time depthwise_gate against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_depthwise_gate.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators


def operations(setting: operators.Setting) -> int:
    """Count the necessary ones, two for a multiply-add, without the product itself.

    Forward has one convolution. Backward has it again, for u's gradient, and the gradients to its input and its weight.
    """
    convolutions = {"forward": 1, "backward": 3, "both": 4}[setting.mode]
    return convolutions * 2 * 9 * torch.Size(setting.shape).numel()


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    channels = setting.shape[1]
    images = {"u": setting.shape, "g": setting.shape}
    parameters = {"weight": (channels, 1, 3, 3), "bias": (channels,)}
    return operators.build("depthwise_gate", setting, images, parameters, device, arguments, operations(setting))


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("depthwise_gate", __doc__, CASES, build)

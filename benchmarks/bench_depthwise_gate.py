"""Time depthwise_gate against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_depthwise_gate.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

from typing import NamedTuple

import torch

from seemore_fast.benchmarks import harness, operators


class Setting(NamedTuple):
    shape: tuple[int, int, int, int]  # of u and g: (B, C, H, W)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "forward"

    def title(self) -> str:
        return operators.title(self)


CPU = [Setting((1, 36, 360, 640)), Setting((1, 36, 360, 640), torch.bfloat16), Setting(operators.PATCHES)]
CUDA = [Setting(*setting) for setting in operators.ON_CUDA]
QUICK = [Setting((1, 5, 9, 14)), Setting((2, 4, 9, 14), torch.bfloat16, channels_last=True)]


def operations(setting: Setting) -> int:
    """Count the necessary ones, two for a multiply-add, without the product itself.

    Forward has one convolution. Backward has it again, for u's gradient, and the gradients to its input and its weight.
    """
    convolutions = {"forward": 1, "backward": 3, "both": 4}[setting.mode]
    return convolutions * 2 * 9 * torch.Size(setting.shape).numel()


def build(setting: Setting, device: torch.device, arguments) -> harness.Case:
    channels = setting.shape[1]
    images = {"u": setting.shape, "g": setting.shape}
    parameters = {"weight": (channels, 1, 3, 3), "bias": (channels,)}
    return operators.build("depthwise_gate", setting, images, parameters, device, arguments, operations(setting))


if __name__ == "__main__":
    cases = {"quick": QUICK, "cpu": CPU, "cuda": CUDA}
    cases = {kind: operators.titled(settings) for kind, settings in cases.items()}
    harness.main("depthwise_gate", __doc__, cases, build)

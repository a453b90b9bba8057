"""Time calibrate against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_calibrate.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

from typing import NamedTuple

import torch

from seemore_fast.benchmarks import command, harness, operators


class Setting(NamedTuple):
    shape: tuple[int, int, int, int]  # of k: (B, C, H, W)
    recursive: int = 2
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "forward"

    def title(self) -> str:
        return operators.title(self, f"recursive={self.recursive}")


def recursive_of(shape: tuple[int, ...]) -> int:
    return 1 if shape[1] == 48 else 2  # L's, else T's


CPU = [Setting((1, 36, 360, 640)), Setting((1, 36, 360, 640), dtype=torch.bfloat16), Setting(operators.PATCHES)]
CUDA = [Setting(shape, recursive_of(shape), dtype) for shape, dtype in operators.ON_CUDA]
QUICK = [Setting((1, 5, 17, 20)), Setting((2, 4, 9, 14), 1, torch.bfloat16, channels_last=True)]


def operations(setting: Setting) -> int:
    """Count the necessary ones, two for a multiply-add, without GELU.

    Forward: every aggregation is one for each element that it reads; on the small map a depthwise 3x3 and a pointwise
    convolution; four for each element that is interpolated. Backward has the gradient to each one's input and, but for
    the interpolation, to its weight, and again the depthwise convolution.
    """
    batch, channels, height, width = setting.shape
    elements, aggregated = batch * channels * height * width, 0
    for _ in range(setting.recursive):
        aggregated += batch * channels * (height // 4 * 4) * (width // 4 * 4)
        height, width = height // 4, width // 4
    small = batch * channels * height * width
    forward = aggregated + (9 + channels) * small + 4 * elements
    backward = 2 * aggregated + (3 * 9 + 2 * channels) * small + 4 * elements
    return 2 * {"forward": forward, "backward": backward, "both": forward + backward}[setting.mode]


def parameters(channels: int) -> dict[str, tuple[int, ...]]:
    return {
        "weight_agg": (channels, 1, 4, 4),
        "bias_agg": (channels,),
        "weight_dw": (channels, 1, 3, 3),
        "bias_dw": (channels,),
        "weight_pw": (channels, channels, 1, 1),
        "bias_pw": (channels,),
    }


def build(setting: Setting, device: torch.device, arguments) -> harness.Case:
    shapes = parameters(setting.shape[1])
    amount, images = operations(setting), {"k": setting.shape}
    return operators.build("calibrate", setting, images, shapes, device, arguments, amount, recursive=setting.recursive)


CASES = operators.cases(QUICK, CPU, CUDA)
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("calibrate", __doc__, CASES, build)

"""Time conv3x3_shuffle, for scale 2, against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_conv3x3_shuffle.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators

SCALE, PLANES = 2, 3


def operations(setting: operators.Setting) -> int:
    """Count those of the convolution, two for a multiply-add; backward has two gradients."""
    products = {"forward": 1, "backward": 2, "both": 3}[setting.mode]
    return products * 2 * 9 * PLANES * SCALE**2 * torch.Size(setting.shape).numel()


def traffic(setting: operators.Setting) -> int:
    """Count the bytes of x or its gradient and of the picture or its own, which is float32."""
    batch, channels, height, width = setting.shape
    pixels = batch * height * width
    x, picture = channels * pixels * setting.dtype.itemsize, PLANES * SCALE**2 * pixels * 4
    return {"forward": x + picture, "backward": 2 * x + picture, "both": 3 * x + 2 * picture}[setting.mode]


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    batch, channels, height, width = setting.shape
    parameters = {"weight": (PLANES * SCALE**2, channels, 3, 3), "bias": (PLANES * SCALE**2,)}
    return operators.build(
        "conv3x3_shuffle",
        setting,
        {"x": setting.shape},
        parameters,
        device,
        arguments,
        operations(setting),
        upstream=(batch, PLANES, SCALE * height, SCALE * width),
        traffic=traffic(setting),
        mean=torch.full((1, PLANES, 1, 1), 0.5, device=device),
        scale=SCALE,
    )


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("conv3x3_shuffle", __doc__, CASES, build)

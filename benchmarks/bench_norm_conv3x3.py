"""Time norm_conv3x3 against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_norm_conv3x3.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators


def operations(setting: operators.Setting) -> int:
    """Count those of the 3x3 and the 1x1 products, two for a multiply-add; backward has two gradients, too."""
    products = {"forward": 1, "backward": 3, "both": 4}[setting.mode]
    return products * 2 * (9 + 2) * setting.shape[1] * torch.Size(setting.shape).numel()


def parameters(channels: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "weight": (channels, channels, 3, 3),
        "bias": (channels,),
        "weight_pw": (2 * channels, channels, 1, 1),
        "bias_pw": (2 * channels,),
    }


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    batch, channels, *size = setting.shape
    return operators.build(
        "norm_conv3x3",
        setting,
        {"x": setting.shape},
        parameters(channels),
        device,
        arguments,
        operations(setting),
        upstream=(batch, 2 * channels, *size),
        activation="gelu",
    )


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("norm_conv3x3", __doc__, CASES, build)

"""Time norm_pointwise against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_norm_pointwise.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators


def operations(setting: operators.Setting) -> int:
    """Count those of the product, two for a multiply-add; backward has it again, and dx and dweight."""
    products = {"forward": 1, "backward": 3, "both": 4}[setting.mode]
    return products * 2 * 2 * setting.shape[1] * torch.Size(setting.shape).numel()


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    batch, channels, *size = setting.shape
    parameters = {"norm_weight": (channels,), "norm_bias": (channels,)}
    parameters |= {"weight": (2 * channels, channels, 1, 1), "bias": (2 * channels,)}
    return operators.build(
        "norm_pointwise",
        setting,
        {"x": setting.shape},
        parameters,
        device,
        arguments,
        operations(setting),
        upstream=(batch, 2 * channels, *size),
        activation="gelu",
    )


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("norm_pointwise", __doc__, CASES, build)

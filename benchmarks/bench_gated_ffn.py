"""Time gated_ffn against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_gated_ffn.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators


def operations(setting: operators.Setting) -> int:
    """Count those of the products and of the gate, two for a multiply-add; backward has two gradients, too."""
    products = {"forward": 1, "backward": 3, "both": 4}[setting.mode]
    return products * 2 * (3 * setting.shape[1] + 9) * torch.Size(setting.shape).numel()


def parameters(channels: int, norm: str = "norm") -> dict[str, tuple[int, ...]]:
    return {
        f"{norm}_weight": (channels,),
        f"{norm}_bias": (channels,),
        "weight_1": (2 * channels, channels, 1, 1),
        "bias_1": (2 * channels,),
        "weight_gate": (channels, 1, 3, 3),
        "bias_gate": (channels,),
        "weight_2": (channels, channels, 1, 1),
        "bias_2": (channels,),
    }


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    shapes = parameters(setting.shape[1])
    return operators.build("gated_ffn", setting, {"x": setting.shape}, shapes, device, arguments, operations(setting))


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("gated_ffn", __doc__, CASES, build)

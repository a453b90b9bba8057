"""Time gated_ffn against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_gated_ffn.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

from typing import NamedTuple

import torch

from seemore_fast.benchmarks import harness, operators


class Setting(NamedTuple):
    shape: tuple[int, int, int, int]  # of x: (B, C, H, W)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "forward"

    def title(self) -> str:
        return operators.title(self)


CPU = [Setting((1, 36, 180, 320)), Setting(operators.PATCHES)]
CUDA = [Setting(*setting) for setting in operators.ON_CUDA]
QUICK = [Setting((1, 5, 9, 14)), Setting((2, 4, 9, 14), torch.bfloat16, channels_last=True)]


def operations(setting: Setting) -> int:
    """Count those of the products and of the gate, two for a multiply-add; backward has two gradients, too."""
    products = {"forward": 1, "backward": 3, "both": 4}[setting.mode]
    return products * 2 * (3 * setting.shape[1] + 9) * torch.Size(setting.shape).numel()


def build(setting: Setting, device: torch.device, arguments) -> harness.Case:
    channels = setting.shape[1]
    parameters = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "weight_1": (2 * channels, channels, 1, 1),
        "bias_1": (2 * channels,),
        "weight_gate": (channels, 1, 3, 3),
        "bias_gate": (channels,),
        "weight_2": (channels, channels, 1, 1),
        "bias_2": (channels,),
    }
    return operators.build(
        "gated_ffn", setting, {"x": setting.shape}, parameters, device, arguments, operations(setting)
    )


if __name__ == "__main__":
    cases = {"quick": QUICK, "cpu": CPU, "cuda": CUDA}
    cases = {kind: operators.titled(settings) for kind, settings in cases.items()}
    harness.main("gated_ffn", __doc__, cases, build)

"""Time striped_conv against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_striped_conv.py --device cpu --instruction-sets

Forward, backward alone (on graphs that are built before), and both in one call.
"""

from typing import NamedTuple

import torch

from seemore_fast.benchmarks import command, harness, operators


class Setting(NamedTuple):
    shape: tuple[int, int, int, int]  # of x: (B, C, H, W)
    taps: int = 11
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    gated: bool = False
    channels_last: bool = False
    mode: str = "forward"

    def title(self) -> str:
        gate = ["gate"] if self.gated else []
        return operators.title(self, f"K={self.taps}", *filter(None, [self.activation]), *gate)


CPU_PHOTO = (1, 36, 360, 640)
CPU = [
    Setting(CPU_PHOTO),
    Setting(CPU_PHOTO, dtype=torch.bfloat16),
    Setting(CPU_PHOTO, gated=True),
    Setting(CPU_PHOTO, channels_last=True),
    Setting(CPU_PHOTO, taps=3, activation="gelu"),
    Setting(operators.PATCHES),
]
VARIANTS = [{}, {"gated": True}, {"taps": 3, "activation": "gelu"}]  # alone; as SEE has it; as MoRE has it
CUDA = [
    *(Setting(shape, dtype=dtype, **variant) for shape, dtype in operators.ON_CUDA for variant in VARIANTS),
    Setting(operators.PHOTO, channels_last=True),
]
QUICK = [
    Setting((1, 5, 9, 14)),
    Setting((2, 4, 9, 14), taps=3, activation="gelu", gated=True, channels_last=True),
    Setting((2, 4, 9, 14), dtype=torch.bfloat16, gated=True),
]


def operations(setting: Setting) -> int:
    """Count the necessary ones, two for a multiply-add, without activation and gate themselves.

    Forward has two convolutions. Backward has the gradient to each one's input and to each one's weight, and again the
    first, whose result the second's weight gradient needs; the second only where activation or gate need its result.
    """
    second = setting.activation is not None or setting.gated
    convolutions = {"forward": 2, "backward": 2 + 2 + 1 + second, "both": 2 + 5 + second}[setting.mode]
    return convolutions * 2 * setting.taps * torch.Size(setting.shape).numel()


def parameters(setting: Setting) -> dict[str, tuple[int, ...]]:
    channels, taps = setting.shape[1], setting.taps
    return {
        "weight_row": (channels, 1, 1, taps),
        "bias_row": (channels,),
        "weight_col": (channels, 1, taps, 1),
        "bias_col": (channels,),
    }


def build(setting: Setting, device: torch.device, arguments) -> harness.Case:
    images = {"x": setting.shape} | ({"gate": setting.shape} if setting.gated else {})
    shapes, amount = parameters(setting), operations(setting)
    return operators.build(
        "striped_conv", setting, images, shapes, device, arguments, amount, activation=setting.activation
    )


CASES = operators.cases(QUICK, CPU, CUDA)
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("striped_conv", __doc__, CASES, build)

"""Time striped_conv, forward and backward, against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_striped_conv.py --device cpu --instruction-sets

Backward is timed alone, on graphs that are built before.
"""

from functools import partial
from typing import NamedTuple

import torch

from seemore_fast import ops, reference
from seemore_fast.benchmarks import harness


class Setting(NamedTuple):
    shape: tuple[int, int, int, int]  # of x: (B, C, H, W)
    taps: int = 11
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    gated: bool = False
    channels_last: bool = False
    backward: bool = False

    def title(self) -> str:
        options = {"gelu": self.activation, "gate": self.gated, "channels_last": self.channels_last}
        words = ["backward" if self.backward else "forward", "x".join(map(str, self.shape)), f"K={self.taps}"]
        return " ".join([*words, harness.SHORT[self.dtype], *(word for word, present in options.items() if present)])


PHOTO, PATCHES = (1, 36, 360, 640), (32, 36, 64, 64)
COMMON = [
    Setting(PHOTO),
    Setting(PHOTO, dtype=torch.bfloat16),
    Setting(PHOTO, gated=True),
    Setting(PHOTO, channels_last=True),
    Setting(PHOTO, taps=3, activation="gelu"),
    Setting(PATCHES),
]
CUDA = [
    *(Setting((1, 36, 480, 640), dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(Setting(PATCHES, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
]
QUICK = [
    Setting((1, 5, 9, 14)),
    Setting((2, 4, 9, 14), taps=3, activation="gelu", gated=True, channels_last=True),
    Setting((2, 4, 9, 14), dtype=torch.bfloat16, gated=True),
]


def titled(settings: list[Setting]) -> dict[str, Setting]:
    both = [setting._replace(backward=backward) for backward in (False, True) for setting in settings]
    return {setting.title(): setting for setting in both}


def operations(setting: Setting) -> int:
    """Count the necessary ones, two for a multiply-add, without activation and gate themselves.

    Forward has two convolutions. Backward has the gradient to each one's input and to each one's weight, and again the
    first, whose result the second's weight gradient needs; the second only where activation or gate need its result.
    """
    second = setting.activation is not None or setting.gated
    convolutions = 2 + 2 + 1 + second if setting.backward else 2
    return convolutions * 2 * setting.taps * torch.Size(setting.shape).numel()


def build(setting: Setting, device: torch.device, options) -> harness.Case:
    channels, taps, backward = setting.shape[1], setting.taps, setting.backward
    shapes = {
        "x": setting.shape,
        "weight_row": (channels, 1, 1, taps),
        "bias_row": (channels,),
        "weight_col": (channels, 1, taps, 1),
        "bias_col": (channels,),
    }
    shapes |= {"gate": setting.shape} if setting.gated else {}
    shapes |= {"upstream": setting.shape} if backward else {}
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format

    def make(seed: int) -> harness.InputSet:
        tensors = harness.random_tensors(shapes, setting.dtype, device, seed)
        images = ("x", "gate", "upstream")
        return {name: t.contiguous(memory_format=layout) if name in images else t for name, t in tensors.items()}

    eager = partial(reference.striped_conv, activation=setting.activation)
    fused = partial(ops.striped_conv, activation=setting.activation)
    providers = harness.ours(harness.operator(fused, backward), device, options.instruction_sets)
    providers |= {
        "torch eager": harness.operator(eager, backward, torch.contiguous_format),
        "torch eager channels_last": harness.operator(eager, backward, torch.channels_last),
    }
    if options.compile:
        providers["torch.compile"] = harness.operator(torch.compile(eager), backward)
    return harness.operator_case(providers, harness.input_sets(make, device), eager, backward, operations(setting))


if __name__ == "__main__":
    harness.main(
        "striped_conv", __doc__, {"quick": titled(QUICK), "cpu": titled(COMMON), "cuda": titled(COMMON + CUDA)}, build
    )

"""Time low_rank_experts against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_low_rank_experts.py --device cuda

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


RANKS, CHOSEN = (2, 4, 8), 2  # T's, and the expert of every image: the largest


def operations(setting: Setting) -> int:
    """Count those of the three products of an expert, two for a multiply-add; backward has two again, too."""
    products = {"forward": 3, "backward": 8, "both": 11}[setting.mode]
    return products * 2 * RANKS[CHOSEN] * torch.Size(setting.shape).numel()


def build(setting: Setting, device: torch.device, arguments) -> harness.Case:
    batch, channels, total = setting.shape[0], setting.shape[1], sum(RANKS)
    parameters = {
        "weight_a": (total, channels),
        "bias_a": (total,),
        "weight_k": (total, channels),
        "bias_k": (total,),
        "weight_out": (channels, total),
        "bias_out": (len(RANKS), channels),
    }
    return operators.build(
        "low_rank_experts",
        setting,
        {"a": setting.shape, "k": setting.shape},
        parameters,
        device,
        arguments,
        operations(setting),
        expert_index=torch.full((batch, 1), CHOSEN, device=device),
        expert_weight=torch.full((batch, 1), 0.75, device=device),
        ranks=RANKS,
    )


if __name__ == "__main__":
    cases = {"quick": QUICK, "cpu": CPU, "cuda": CUDA}
    cases = {kind: operators.titled(settings) for kind, settings in cases.items()}
    harness.main("low_rank_experts", __doc__, cases, build)

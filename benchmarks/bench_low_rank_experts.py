"""Time low_rank_experts against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_low_rank_experts.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators

RANKS, CHOSEN = (2, 4, 8), 2  # T's, and the expert of every image: the largest


def operations(setting: operators.Setting) -> int:
    """Count those of the three products of an expert, two for a multiply-add; backward has two again, too."""
    products = {"forward": 3, "backward": 8, "both": 11}[setting.mode]
    return products * 2 * RANKS[CHOSEN] * torch.Size(setting.shape).numel()


def parameters(channels: int) -> dict[str, tuple[int, ...]]:
    total = sum(RANKS)
    return {
        "weight_a": (total, channels),
        "bias_a": (total,),
        "weight_k": (total, channels),
        "bias_k": (total,),
        "weight_out": (channels, total),
        "bias_out": (len(RANKS), channels),
    }


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    batch, channels = setting.shape[:2]
    return operators.build(
        "low_rank_experts",
        setting,
        {"a": setting.shape, "k": setting.shape},
        parameters(channels),
        device,
        arguments,
        operations(setting),
        expert_index=torch.full((batch, 1), CHOSEN, device=device),
        expert_weight=torch.full((batch, 1), 0.75, device=device),
        ranks=RANKS,
    )


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("low_rank_experts", __doc__, CASES, build)

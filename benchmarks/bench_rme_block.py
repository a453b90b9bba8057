"""Time rme_block, the first half of a group, against eager PyTorch and this machine's copying and multiplying.

    python benchmarks/bench_rme_block.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import (
    bench_calibrate,
    bench_gated_ffn,
    bench_low_rank_experts,
    bench_norm_conv3x3,
    bench_pointwise,
    bench_striped_conv_router,
    command,
    harness,
    operators,
)


def recursive_of(setting: operators.Setting) -> int:
    return 1 if min(setting.shape[2:]) < 16 else bench_calibrate.recursive_of(setting.shape)


def operations(setting: operators.Setting) -> int:
    """Count those of its operators and of the projection."""
    maps = bench_calibrate.Setting(setting.shape, recursive_of(setting), setting.dtype, mode=setting.mode)
    parts = (bench_norm_conv3x3, bench_striped_conv_router, bench_low_rank_experts, bench_pointwise, bench_gated_ffn)
    return bench_calibrate.operations(maps) + sum(part.operations(setting) for part in parts)


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    channels, ranks = setting.shape[1], bench_low_rank_experts.RANKS
    expand = bench_norm_conv3x3.parameters(channels)
    names = ("norm_1_weight", "norm_1_bias", "weight_conv", "bias_conv", "weight_expand", "bias_expand")
    parameters = {
        **dict(zip(names, expand.values(), strict=True)),
        **bench_calibrate.parameters(channels),
        **bench_striped_conv_router.parameters(setting),
        **bench_low_rank_experts.parameters(channels),
        "weight_proj": (channels, channels, 1, 1),
        "bias_proj": (channels,),
        **bench_gated_ffn.parameters(channels, norm="norm_2"),
    }
    return operators.build(
        "rme_block",
        setting,
        {"x": setting.shape},
        parameters,
        device,
        arguments,
        operations(setting),
        ranks=ranks,
        top_k=1,
        recursive=recursive_of(setting),
        use_shuffle=False,
    )


CASES = operators.cases(operators.QUICK_BLOCK)
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("rme_block", __doc__, CASES, build)

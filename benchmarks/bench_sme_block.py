"""Time sme_block, the second half of a group, against eager PyTorch and this machine's copying and multiplying.

    python benchmarks/bench_sme_block.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call.
"""

import torch

from seemore_fast.benchmarks import (
    bench_gated_ffn,
    bench_norm_pointwise,
    bench_pointwise,
    bench_striped_conv,
    command,
    harness,
    operators,
)


def operations(setting: operators.Setting) -> int:
    """Count those of its operators; what a block makes again in backward is not necessary."""
    stripes = bench_striped_conv.Setting(setting.shape, dtype=setting.dtype, gated=True, mode=setting.mode)
    parts = (bench_norm_pointwise, bench_pointwise, bench_gated_ffn)
    return bench_striped_conv.operations(stripes) + sum(part.operations(setting) for part in parts)


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    channels = setting.shape[1]
    parameters = {
        "norm_1_weight": (channels,),
        "norm_1_bias": (channels,),
        "weight_qv": (2 * channels, channels, 1, 1),
        "bias_qv": (2 * channels,),
        **bench_striped_conv.parameters(bench_striped_conv.Setting(setting.shape)),
        "weight_proj": (channels, channels, 1, 1),
        "bias_proj": (channels,),
        **bench_gated_ffn.parameters(channels, norm="norm_2"),
    }
    return operators.build(
        "sme_block", setting, {"x": setting.shape}, parameters, device, arguments, operations(setting)
    )


CASES = operators.cases(operators.QUICK_BLOCK)
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("sme_block", __doc__, CASES, build)

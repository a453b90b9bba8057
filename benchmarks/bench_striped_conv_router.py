"""Time striped_conv_router, as MoRE has it, against eager PyTorch and this machine's speed of copying and multiplying.

    python benchmarks/bench_striped_conv_router.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call. The chosen experts are checked by their
probabilities; those of random images are nearly equal.
"""

import torch

from seemore_fast.benchmarks import bench_router, bench_striped_conv, command, harness, operators

TAPS = 3


def striped(setting: operators.Setting) -> bench_striped_conv.Setting:
    return bench_striped_conv.Setting(setting.shape, TAPS, setting.dtype, "gelu", mode=setting.mode)


def operations(setting: operators.Setting) -> int:
    """Count those of the striped convolution and of the router."""
    return bench_striped_conv.operations(striped(setting)) + bench_router.operations(setting)


def parameters(setting: operators.Setting) -> dict[str, tuple[int, ...]]:
    router = {"weight_router": (bench_router.EXPERTS, setting.shape[1])}
    return bench_striped_conv.parameters(striped(setting)) | router


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    return operators.build(
        "striped_conv_router",
        setting,
        {"x": setting.shape},
        parameters(setting),
        device,
        arguments,
        operations(setting),
        upstream=[setting.shape, (setting.shape[0], bench_router.TOP_K)],
        top_k=bench_router.TOP_K,
        activation="gelu",
    )


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("striped_conv_router", __doc__, CASES, build)

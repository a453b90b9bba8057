"""Time router against eager PyTorch and this machine's speed of copying.

    python benchmarks/bench_router.py --device cuda

Forward, backward alone (on graphs that are built before), and both in one call. The chosen experts are checked by their
probabilities; those of random images are nearly equal.
"""

import torch

from seemore_fast.benchmarks import command, harness, operators

EXPERTS, TOP_K = 3, 1  # those of T, B and L


def operations(setting: operators.Setting) -> int:
    """Count the additions of the pool; all else is per image, and backward only spreads a value per channel."""
    return 0 if setting.mode == "backward" else torch.Size(setting.shape).numel()


def traffic(setting: operators.Setting) -> int:
    """Count the bytes of one image for the pool, one for its gradient, which needs the means alone."""
    images = {"forward": 1, "backward": 1, "both": 2}[setting.mode]
    return images * torch.Size(setting.shape).numel() * setting.dtype.itemsize


def build(setting: operators.Setting, device: torch.device, arguments) -> harness.Case:
    images, parameters = {"a": setting.shape}, {"weight": (EXPERTS, setting.shape[1])}
    return operators.build(
        "router",
        setting,
        images,
        parameters,
        device,
        arguments,
        operations(setting),
        upstream=(setting.shape[0], TOP_K),
        traffic=traffic(setting),
        top_k=TOP_K,
    )


CASES = operators.cases()
test_speed = operators.test_speed

if __name__ == "__main__":
    command.main("router", __doc__, CASES, build)

"""`pytest benchmarks/`: every operator, case and provider as a test of pytest-benchmark, checked before it is timed.

--bench-quick takes tiny cases once, to see that all of it works; --bench-device chooses where.
"""

import argparse
import functools

import pytest
import torch

from seemore_fast.benchmarks import harness, operators


def pytest_addoption(parser):
    group = parser.getgroup("seemore-fast")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--bench-quick", action="store_true", help="tiny cases, one round: sees that they work")
    group.addoption("--bench-rounds", type=int, default=20, help="timed calls of each provider (default: 20)")
    group.addoption("--bench-compile", action="store_true", help="time torch.compile, too")


def pytest_generate_tests(metafunc):
    if "checked" not in metafunc.fixturenames:
        return
    option, device = metafunc.config.getoption, metafunc.config.getoption("--bench-device")
    kind = "quick" if option("--bench-quick") else torch.device(device).type
    providers = [f"{harness.OURS} {name}" for name, serves in harness.SERVES.items() if device.startswith(serves)]
    providers += [f"{harness.OURS} auto", "torch eager", "torch eager channels_last"]
    providers += ["torch.compile"] if option("--bench-compile") else []
    metafunc.parametrize("title", list(metafunc.module.CASES[kind]))  # outermost: a case is made once
    metafunc.parametrize("provider", providers)


@pytest.fixture(scope="module")
def checked(request):
    """Function from a title to the case, which is kept until the next one is asked for."""
    option, module = request.config.getoption, request.module
    device, quick = torch.device(option("--bench-device")), option("--bench-quick")
    kind, rounds = ("quick", 1) if quick else (device.type, option("--bench-rounds"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options = argparse.Namespace(compile=option("--bench-compile"), instruction_sets=False)

    @functools.lru_cache(maxsize=1)
    def case(title: str) -> operators.Checked:
        return operators.Checked(module.build(module.CASES[kind][title], device, options), device, rounds)

    return case

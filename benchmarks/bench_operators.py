"""`pytest benchmarks/`: every operator, case and provider under pytest-benchmark, checked before it is timed.

A wrong provider fails and is not timed. pytest-benchmark's JSON contains rates, their shares of what a copy and a
matrix product reached, and the largest error as extra_info. The options are in conftest.py.
"""

import argparse
import functools
import itertools
from statistics import median

import pytest
import torch

from seemore_fast.benchmarks import harness, operators
from seemore_fast.benchmarks.cases import OPERATORS


def pytest_generate_tests(metafunc):
    option, device = metafunc.config.getoption, metafunc.config.getoption("--bench-device")
    kind = "quick" if option("--bench-quick") else torch.device(device).type
    providers = [
        f"{harness.OURS} {name}" for name, serves in harness.BACKEND_DEVICES.items() if device.startswith(serves)
    ]
    providers += [f"{harness.OURS} auto", *operators.EAGER, *(["torch.compile"] if option("--bench-compile") else [])]
    cases = [
        pytest.param(name, title, id=f"{name}-{title}") for name in OPERATORS for title in OPERATORS[name].cases()[kind]
    ]
    metafunc.parametrize(("operator", "title"), cases)  # outermost: a case is made once
    metafunc.parametrize("provider", providers)


class Checked:
    """A checked case, and the rates of a copy and a matrix product during the same minutes."""

    def __init__(self, case: harness.Case, device: torch.device, rounds: int):
        self.rounds, self._case, self._device, self._precision = rounds, case, device, harness.precision_of("", case)
        harness.keep_memory()
        self.rows, self.calls = harness.check(case)
        limits = harness.machine_limits(case, device, [self._precision])
        times, _ = harness.take_turns({name: calls for name, (calls, *_) in limits.items()}, case, device, rounds)
        self._limits = {name: (limits[name][1] or limits[name][2]) / median(times[name]) / 1e6 for name in limits}

    def finish(self, call):
        """Run a call to its end, on a GPU too."""
        call()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def rates(self, milliseconds: float) -> dict[str, float]:
        """Return the GB/s and GFLOP/s of a call, and their shares of the machine's."""
        found = {}
        for rate, share, amount, limit in (
            ("gb_s", "of_copy", self._case.bytes, harness.COPY),
            ("gflop_s", "of_matmul", self._case.operations, harness.MATMUL + self._precision),
        ):
            if amount:
                found[rate] = amount / milliseconds / 1e6
                found[share] = found[rate] / self._limits[limit]
        return found


@pytest.fixture(scope="module")
def checked(request):
    """Function from operator and title to the Checked case, kept until the next one is requested."""
    option = request.config.getoption
    device, quick = torch.device(option("--bench-device")), option("--bench-quick")
    kind, rounds = ("quick", 1) if quick else (device.type, option("--bench-rounds"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options = argparse.Namespace(compile=option("--bench-compile"), instruction_sets=False, quick=quick)

    @functools.lru_cache(maxsize=1)
    def case(operator: str, title: str) -> Checked:
        setting = OPERATORS[operator].cases()[kind][title]
        return Checked(operators.build(operator, setting, device, options), device, rounds)

    return case


def test_speed(operator, title, provider, checked, benchmark):
    case = checked(operator, title)
    row = case.rows.get(provider, {"absent": "not part of this case"})
    if "absent" in row:
        pytest.skip(row["absent"])
    if provider not in case.calls:
        pytest.fail(row.get("wrong") or row["failed"])
    calls, warm_up = itertools.cycle(case.calls[provider]), min(case.rounds, harness.WARM_UP)
    benchmark.group = f"{operator} {title}"
    benchmark.pedantic(case.finish, setup=lambda: ((next(calls),), {}), rounds=case.rounds, warmup_rounds=warm_up)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info |= row | case.rates(1000 * benchmark.stats.stats.median)

"""Tuning of Triton's tiles: order, refused configurations and time limit."""

import json
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from helpers.interpreter import run_without

from seemore_fast.benchmarks import tune_triton
from seemore_fast.kernels import configurations, low_rank_experts

pytestmark = pytest.mark.triton

# As on a GPU, but that a configuration's "time" is by a table and tensors have no memory.
WITHOUT_A_GPU = """
import sys, torch, triton.testing
from seemore_fast.benchmarks import tune_triton
from seemore_fast.kernels.configurations import Configuration

def do_bench(run, **options):
    launch = run.__self__
    chosen = launch.arguments["PIXELS"], launch.num_warps
    print("timed", *chosen)
    return {(16, 2): 3.0, (32, 2): 2.0, (64, 4): 1.0}[chosen]

triton.testing.do_bench = do_bench
tune_triton.TIMED = [Configuration(32, 2), Configuration(64, 4)]
x = torch.empty(1, 36, 480, 640, dtype=torch.bfloat16, device="meta")
print(tune_triton.fastest("norm_conv3x3 pack", x, 90, Configuration(16, 2)))
print(tune_triton.fastest("norm_pointwise forward", x, 90, Configuration(16, 2)))
"""


def test_the_fastest_that_fits_is_chosen_and_wgmma_does_not_fit():
    chosen = [line for line in run_without("-c", WITHOUT_A_GPU).splitlines() if line.startswith("Configuration")]
    # the first has no product; the second's of 64 pixels by four warps would be wgmma
    assert chosen == [
        "Configuration(pixels=64, warps=4, stages=1, registers=0)",
        "Configuration(pixels=32, warps=2, stages=1, registers=0)",
    ]


def test_the_most_important_kernels_come_first():
    entries = next(iter(configurations.table().values()))
    order = tune_triton.by_value(entries, None)
    assert order[:4] == [(name, "2 bytes", "") for name in (*tune_triton.FIRST, "low_rank_experts forward")]
    assert order[-1][1:] == ("4 bytes", ", many channels") and not order[-1][0].endswith("forward")
    assert sorted((name, size + tier) for name, size, tier in order) == sorted(
        (name, key) for name, keys in entries.items() for key in keys
    )
    only = tune_triton.by_value(entries, ["conv3x3_shuffle forward"])
    assert only == [("conv3x3_shuffle forward", "4 bytes", tier) for tier in tune_triton.CHANNELS]


def test_no_kernel_starts_after_the_time_limit_and_each_is_written(tmp_path, monkeypatch, capsys):
    clock, output, before = iter(range(1000)), tmp_path / "table.json", configurations.FILE.read_text()
    monkeypatch.setattr(tune_triton.time, "monotonic", lambda: next(clock))
    written = []

    def first_that_fits(*arguments):
        written.append(output.exists() and json.loads(output.read_text())["90"])
        return configurations.Configuration(16, 8)

    monkeypatch.setattr(tune_triton, "first_that_fits", first_that_fits)
    monkeypatch.setattr(configurations, "MEANT", configurations.MEANT)
    command = ["tune_triton", "--architectures", "90", "--seconds", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    tune_triton.main()
    first, second, third = tune_triton.FIRST
    assert len(written) == 3 and not written[0]
    assert written[1][first]["2 bytes"] == [16, 8, 1, 0] and written[2][second]["2 bytes"] == [16, 8, 1, 0]
    assert json.loads(output.read_text())["90"][third]["2 bytes"] == [16, 8, 1, 0]
    assert "no time left for sm_90 low_rank_experts forward, 2 bytes" in capsys.readouterr().out
    assert configurations.FILE.read_text() == before and list(tmp_path.iterdir()) == [output]


def test_timed_experts_have_valid_indices():
    """Memory as it comes holds no index of an expert: kernels would be timed without any work."""
    torch.use_deterministic_algorithms(True)
    try:
        launches = [launch for _, launch in low_rank_experts.specializations(torch.empty(2, 36, 8, 8))]
    finally:
        torch.use_deterministic_algorithms(False)
    indices = [launch.arguments["expert_index"] for launch in launches if "expert_index" in launch.arguments]
    assert indices and all(((index >= 0) & (index < 3)).all() for index in indices)

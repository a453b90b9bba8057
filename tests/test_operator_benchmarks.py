"""The benchmarks of single operators, and the table of what each operator has to move and to compute."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import BENCHMARKS
from helpers.benchmarks import figures, scaled_sum
from helpers.networks import T
from helpers.ops import calibrate_shapes, expert_shapes, ffn_shapes, norm_shapes, striped_shapes
from torch.utils.flop_counter import FlopCounterMode

from seemore_fast import reference
from seemore_fast.cli import main


def benchmark_of(operator):
    return runpy.run_path(str(BENCHMARKS / f"bench_{operator}.py"))


def test_operations_of_striped_conv():
    module = benchmark_of("striped_conv")
    forward, convolution = module["Setting"]((1, 2, 3, 4), taps=5), 2 * 5 * 24  # a multiply-add counts two
    backward = forward._replace(mode="backward")
    settings = [forward, backward, backward._replace(gated=True), backward._replace(activation="gelu")]
    counted = [module["operations"](setting) / convolution for setting in settings]
    assert counted == [2, 5, 6, 6]


STEMS = ["striped_conv", "calibrate", "router"]
STEMS += ["norm_pointwise", "gated_ffn", "norm_conv3x3", "low_rank_experts"]
STEMS += ["pointwise", "conv3x3_shuffle", "striped_conv_router", "rme_block", "sme_block"]


def test_every_operator_has_a_benchmark():
    from seemore_fast import ops

    assert set(ops.__all__) == set(STEMS)


@pytest.mark.parametrize("operator", STEMS)
def test_operations_of_both_are_those_of_either(operator):
    module = benchmark_of(operator)
    setting = next(iter(module["CASES"]["quick"].values()))._replace(shape=(2, 3, 21, 34))
    forward, backward, both = (module["operations"](setting._replace(mode=mode)) for mode in module["harness"].MODES)
    assert both == forward + backward
    assert forward > 0


def test_on_cuda_ours_is_timed_in_a_graph_too(harness, monkeypatch):
    from seemore_fast.benchmarks import operators

    def table(mode):
        return operators.ours("router", scaled_sum, mode, torch.device("cuda"), False)

    info = {"available": ["reference", "cuda", "triton"], "unavailable": {}, "operators": {"router": ["cuda"]}}
    monkeypatch.setattr(harness.seemore_fast, "backend_info", lambda: info)
    names = ["seemore-fast cuda", "seemore-fast triton"]
    assert list(table("forward")) == [*names, "seemore-fast cuda, in a graph"]
    assert table("forward")["seemore-fast triton"] == "this backend has no kernel of router"
    assert list(table("both")) == names
    info["operators"] = {"norm_pointwise": ["triton"]}
    assert callable(operators.ours("pointwise", scaled_sum, "both", torch.device("cuda"), False)[names[1]])
    info |= {"operators": {"router": ["cuda"]}, "unavailable": {"cuda": "no GPU", "triton": "no GPU"}}
    lines = table("forward")
    assert lines["seemore-fast cuda, in a graph"] == "no GPU"
    assert list(lines)[-1] == "seemore-fast reference"


@pytest.mark.parametrize("operator, count", [(stem, 3 if stem == "striped_conv" else 2) for stem in STEMS])
def test_bench_operators(harness, bench, tmp_path, operator, count):
    bench(operator, "--results", tmp_path, "--threads", 1)
    cases = figures(next(tmp_path.glob(f"*/{operator}.json")))
    assert [title.split()[0] for title in cases] == [mode for mode in harness.MODES for _ in range(count)]
    for title, lines in cases.items():
        assert operator.endswith("block") or set(lines["seemore-fast cpu"]) & {"ms", "absent"}
        assert any("ms" in line for name, line in lines.items() if name.startswith("seemore-fast"))
        for provider in ("torch eager", "torch eager channels_last"):
            line = lines[provider]
            assert min(line["ms"], line["gb_s"], line["of_copy"]) > 0
            assert (line["gflop_s"] or 0) > 0 or title.startswith("backward")  # a router's adds nothing
            assert line["max_error"] < (0.5 if operator.endswith("block") else 0.05)
        assert lines["clone"]["gb_s"] > 0
        assert "max_error" not in lines["clone"]


def test_the_command_runs_operators_with_such_a_case(tmp_path, capsys):
    arguments = ["benchmark", "kernels", "--quick", "--runs", "1", "--device", "cpu", "--results", str(tmp_path)]
    assert main([*arguments, "--case", "backward 1x5x9x14 K=11"]) == 0
    assert [path.name for path in tmp_path.glob("*/*")] == ["striped_conv.json"]
    with pytest.raises(SystemExit):
        main([*arguments, "--case", "sideways"])
    assert "no case has 'sideways' in its title" in capsys.readouterr().err


def test_the_command_goes_on_after_a_wrong_operator_and_fails(monkeypatch, capsys):
    from seemore_fast.benchmarks import bench_router

    def wrong(setting, device, options, build=bench_router.build):
        case = build(setting, device, options)
        case.providers["seemore-fast cpu"] = lambda tensors: lambda: torch.zeros(1, 1)
        return case

    monkeypatch.setattr(bench_router, "build", wrong)
    arguments = ["benchmark", "kernels", "--quick", "--runs", "1", "--device", "cpu", "--case", "forward 1x5"]
    with pytest.raises(SystemExit, match="wrong or fails in router: see above"):
        main([*arguments, "--operators", "router", "pointwise"])
    assert "\npointwise\n" in capsys.readouterr().out


def test_the_file_of_results_can_be_named(bench, tmp_path):
    bench("router", "--results", tmp_path, "--case", "forward", "--name", "router_forward")
    assert [path.name for path in tmp_path.glob("*/*")] == ["router_forward.json"]


def run_pytest(tmp_path, *arguments, **environment):
    """Run `pytest benchmarks/` on tiny cases; return what it printed, and pytest-benchmark's JSON by test."""
    written = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCHMARKS), "--bench-quick"]
    command += ["--bench-device", "cpu", "--benchmark-json", str(written), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=os.environ | environment)
    return done, {test["fullname"]: test for test in json.loads(written.read_text())["benchmarks"]}


def test_pytest_runs_every_benchmark(tmp_path):
    """The smoke pass."""
    done, tests = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout
    assert {name.split("::")[0] for name in tests} == {f"benchmarks/bench_{stem}.py" for stem in STEMS}
    for name, test in tests.items():
        extra = test["extra_info"]
        assert extra["gb_s"] > 0 and extra["of_copy"] > 0 and extra["max_error"] < 0.5
        assert extra.get("gflop_s", 0) > 0 or ("bench_router" in name and "backward" in name)
    # a provider of ours for every case, and both layouts of eager PyTorch
    for stem in STEMS:
        in_file = [name.partition("[")[2][:-1] for name in tests if f"bench_{stem}.py" in name]
        by_case = {title: {name.removeprefix(f"{title}-") for name in in_file if name.startswith(title)}
                   for title in benchmark_of(stem)["CASES"]["quick"]}  # fmt: skip
        ours = "seemore-fast auto" if stem.endswith("block") else "seemore-fast cpu"
        for title, providers in by_case.items():
            assert providers == {ours, "torch eager channels_last", "torch eager"}, (stem, title)


def test_pytest_fails_a_wrong_provider(tmp_path):
    (tmp_path / "break_it.py").write_text(
        "import seemore_fast.benchmarks.operators as o\n"
        "right = o.ours\n"
        "def ours(stem, fused, *rest):\n"
        "    return right(stem, lambda **t: (lambda i, p: (i, 1.1 * p))(*fused(**t)), *rest)\n"
        "o.ours = ours\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    done, tests = run_pytest(tmp_path, "-p", "break_it", "-k", "router and forward and not striped", **environment)
    assert done.returncode == 1 and "result 0 errs by" in done.stdout
    assert {test["extra_info"].get("absent") for test in tests.values()} == {None}
    assert not any("seemore-fast" in name for name in tests)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["striped_conv", "router"])
def test_compiled_peers(bench, tmp_path, operator):
    """Not calibrate, whose backward torch 2.13 does not compile for a small map of one pixel."""
    bench(operator, "--results", tmp_path, "--compile")
    for lines in figures(next(tmp_path.glob("*/*.json"))).values():
        assert lines["torch.compile"]["ms"] > 0


# The table of work


@pytest.fixture(scope="module")
def work():
    from seemore_fast.benchmarks import intensity

    return intensity.all_work()


def counted(function, *arguments, **options):
    """Return the multiply-adds of convolutions and matrices, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments, **options)
    return counter.get_total_flops() / 2


def on_meta(images, shapes):
    """Return the arguments: so many images of T at 480x640, parameters."""
    shapes = [*[(1, 36, 480, 640)] * images, *shapes.values()]
    return [torch.empty(shape, device="meta") for shape in shapes]


def test_work_is_what_torch_counts(work):
    c, pixels = 36, 480 * 640
    norm, wide = norm_shapes(c), {"weight": (2 * c, c, 1, 1), "bias": (2 * c,)}
    dense = {"weight": (c, c, 3, 3), "bias": (c,)}
    striped = striped_shapes(c, 11)
    x, *conv_parameters = on_meta(1, norm | dense)
    index, probability = torch.zeros(1, 1, dtype=torch.int64, device="meta"), torch.zeros(1, 1, device="meta")
    a, k, *experts = on_meta(2, expert_shapes(c, [2, 4, 8]))
    found = {
        "striped_conv K=11, forward": counted(reference.striped_conv, *on_meta(1, striped)),
        "striped_conv K=3 gelu, forward": counted(reference.striped_conv, *on_meta(1, striped_shapes(c, 3))),
        "calibrate, forward": counted(reference.calibrate, *on_meta(1, calibrate_shapes(c)), 2) + 4 * c * pixels,
        "norm_pointwise C to 2C gelu": counted(reference.norm_pointwise, *on_meta(1, norm | wide)),
        "norm_conv3x3 C to C gelu to 2C": counted(
            reference.norm_conv3x3, x, *conv_parameters, *on_meta(0, wide), activation="gelu"
        ),
        "gated_ffn": counted(reference.gated_ffn, *on_meta(1, norm | ffn_shapes(c))),
        "low_rank_experts, rank 8": counted(
            reference.low_rank_experts, a, k, index, probability, *experts, ranks=[2, 4, 8]
        ),
    }
    assert {name: work[name].vector + work[name].matrix for name in found} == found


def test_work_of_blocks_is_what_torch_counts(work):
    group, elements = reference.SeemoRe(scale=2, **T).eval().body[0], 36 * 480 * 640
    in_torch = 100 * (counted(group, torch.rand(1, 36, 48, 64)) - 36 * 3)  # without the router's matrix
    ours = sum(work[name].vector + work[name].matrix for name in ("rme_block", "sme_block"))
    assert ours == in_torch + 4 * elements + elements  # interpolation and pool, which torch does not count


def test_work_of_backward_holds_that_of_its_convolutions(work):
    """What is computed again comes on top."""
    assert work["striped_conv K=11, backward"].vector == 5 / 2 * work["striped_conv K=11, forward"].vector


def test_the_readme_has_the_table():
    from seemore_fast.benchmarks import intensity

    assert intensity.table() in (BENCHMARKS / "README.md").read_text()

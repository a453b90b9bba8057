"""Command lines of the benchmarks: what they run, write and refuse; operators, and the table of their work."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import BENCHMARKS, processes
from helpers.benchmarks import figures, scaled_sum
from helpers.networks import T
from torch.utils.flop_counter import FlopCounterMode

from seemore_fast import SeemoRe, ops, reference, use_backend
from seemore_fast.benchmarks import intensity, operators
from seemore_fast.benchmarks.cases import OPERATORS, Setting, input_shapes
from seemore_fast.cli import main


@pytest.fixture
def bench(harness, capsys):
    """Run `seemore-fast benchmark kernels` on tiny cases of operators; return its output."""

    def run(names, *arguments):
        options = ["--device", "cpu", "--quick", "--runs", "1", "--threads", "1", "--operators", *names.split()]
        main(["benchmark", "kernels", *options, *map(str, arguments)])
        return capsys.readouterr().out

    return run


def written(folder):
    return [path.name for path in folder.glob("*/*")]


# The command line


def test_a_partial_run_writes_only_with_results(bench, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*/*")}
    printed = bench("striped_conv", "--case", "K=3")
    assert printed.count("torch eager channels_last") == 3 and "figures in" not in printed
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*/*")} == before
    one = "--case", "forward 1x5x9x14 fp32"
    bench("router pointwise calibrate", "--results", tmp_path, *one)  # calibrate has none of this title
    assert sorted(written(tmp_path)) == ["pointwise.json", "router.json"]
    bench("router", "--results", tmp_path / "named", *one, "--name", "router_forward")
    assert written(tmp_path / "named") == ["router_forward.json"]


def test_an_interrupted_run_keeps_its_figures(harness, bench, monkeypatch, tmp_path):
    run_case, done = harness.run_case, []

    def breaks(*arguments):
        done.append(arguments)
        return run_case(*arguments) if len(done) < 3 else 1 / 0

    monkeypatch.setattr(harness, "run_case", breaks)
    with pytest.raises(ZeroDivisionError):
        bench("router", "--results", tmp_path)
    path = next(tmp_path.glob("*/router.json"))
    assert (len(figures(path)), json.loads(path.read_text())["cases_left_out"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["kernels", "--case", "K=4"], "no case has 'K=4' in its title"),
        (["kernels", "--device", "gpu"], "--device is 'gpu', expected auto, cpu, cuda"),
        (["kernels", "--device", "mps"], "--device is 'mps', but torch finds no Apple GPU here"),
        (["kernels", "--device", "cpu", "--runs", "-3"], "--runs is -3, expected at least 1"),
        (["kernels", "--device", "cpu", "--threads", "0"], "--threads is 0, expected at least 1"),
        (["kernels", "--name", "all"], "choose one of the --operators"),
        (["training", "--device", "cuda:99"], "--device is 'cuda:99', "),
        (["training", "--runs", "0"], "--runs is 0, expected at least 1"),
        (["upscaling", "--turns", "0"], "--turns is 0, expected at least 1"),
        (["loop", "--data", "nowhere", "--device", "cpu"], "data.train: "),
        (["lunch"], "inference"),
    ],
)
def test_invalid_options(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "inference", "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and printed.startswith("usage: seemore-fast benchmark inference")
    assert {"--threads", "--instruction-sets", "--case", "--quick"} <= set(printed.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_script_without_a_gpu_reports_it():
    command, path = [sys.executable, BENCHMARKS / "training.py", "--device", "cuda"], str(BENCHMARKS.parent)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2 and "no CUDA device here" in done.stderr and "Traceback" not in done.stderr


def test_upscaling_is_timed_beside_the_network(tmp_path, capsys):
    options = ["--quick", "--device", "cpu", "--turns", "1", "--results", str(tmp_path)]
    assert main(["benchmark", "upscaling", *options]) == 0
    cases = figures(next(tmp_path.glob("*/upscaling.json")))
    small, large = cases["T x2 6 images 24x24"], cases["T x2 64x48"]
    assert set(small) == {f"seemore-fast {name}" for name in ("network alone", "folder of PNG", "folder of JPEG")}
    assert set(large) == {"seemore-fast whole", "seemore-fast streamed"}
    printed = capsys.readouterr().out
    share = small["seemore-fast network alone"]["ms"] / small["seemore-fast folder of PNG"]["ms"]
    assert f"folder of PNG: {share:.1%} of the network's own speed" in printed
    ratio = large["seemore-fast streamed"]["ms"] / large["seemore-fast whole"]["ms"]
    assert f"streamed: {ratio:.2f}x the whole image's time" in printed


def test_the_loop_is_timed_beside_its_step(work, tmp_path, capsys):
    options = ["--quick", "--device", "cpu", "--turns", "2", "--steps", "3", "--data", str(work / "photos")]
    assert main(["benchmark", "loop", *options, "--results", str(tmp_path / "out")]) == 0
    rows = figures(next((tmp_path / "out").glob("*/loop.json")))["tiny"]
    bare, loop = (rows[f"seemore-fast {name}"] for name in ("bare step", "loop"))
    assert len(rows) == 2 and bare["runs"] == loop["runs"] == 2
    assert f"the loop reaches {bare['ms'] / loop['ms']:.1%} of the bare step's speed" in capsys.readouterr().out


# Operators


def test_every_operator_has_cases():
    assert set(ops.__all__) <= set(OPERATORS)


def test_operations_of_striped_conv():
    convolution = 2 * 5 * 24  # a multiply-add counts two
    for backward, more in ((5, {}), (6, {"gated": True}), (6, {"activation": "gelu"})):
        counted = OPERATORS["striped_conv"].operations(Setting((1, 2, 3, 4), taps=5, **more))
        assert counted == (2 * convolution, backward * convolution)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_checked_and_timed(harness, bench, tmp_path, operator):
    bench(operator, "--results", tmp_path)
    cases, is_block = figures(next(tmp_path.glob(f"*/{operator}.json"))), operator.endswith("block")
    count = 3 if operator == "striped_conv" else 2
    assert [title.split()[0] for title in cases] == [mode for mode in harness.MODES for _ in range(count)]
    for title, rows in cases.items():
        assert is_block or set(rows["seemore-fast cpu"]) & {"ms", "absent"}
        assert any("ms" in row for name, row in rows.items() if name.startswith("seemore-fast"))
        for provider in ("torch eager", "torch eager channels_last"):
            row = rows[provider]
            assert min(row["ms"], row["gb_s"], row["of_copy"]) > 0
            assert (row["gflop_s"] or 0) > 0 or title.startswith("backward")  # a router's has no operations
            assert row["max_error"] < (0.5 if is_block else 0.05)
        assert rows["clone"]["gb_s"] > 0 and "max_error" not in rows["clone"]


def test_a_wrong_operator_fails_after_the_others_have_run(monkeypatch, bench, tmp_path, capsys):
    def on_backends(name, provider, *rest, right=operators.on_backends):
        wrong = {"seemore-fast cpu": lambda tensors: lambda: torch.zeros(1, 1)}
        return wrong if name == "router" else right(name, provider, *rest)

    monkeypatch.setattr(operators, "on_backends", on_backends)
    with pytest.raises(SystemExit, match="seemore-fast is wrong or fails in router: see above"):
        bench("router pointwise", "--case", "forward 1x5", "--results", tmp_path)
    assert "\npointwise\n" in capsys.readouterr().out
    rows = next(iter(figures(next(tmp_path.glob("*/router.json"))).values()))
    assert "errs by" in rows["seemore-fast cpu"]["wrong"]


def test_on_cuda_ours_is_timed_in_a_graph_too(harness, monkeypatch):
    def table(mode, name="router"):
        return operators.on_backends(name, harness.operator(scaled_sum, mode), mode, torch.device("cuda"), False)

    info = {"available": ["reference", "cuda", "triton"], "unavailable": {}, "operators": {"router": ["cuda"]}}
    monkeypatch.setattr(harness.seemore_fast, "backend_info", lambda: info)
    names = ["seemore-fast cuda", "seemore-fast triton"]
    assert list(table("forward")) == [*names, "seemore-fast cuda, in a graph"]
    assert table("forward")["seemore-fast triton"] == "this backend has no kernel of router"
    assert list(table("both")) == names
    info["operators"] = {"norm_pointwise": ["triton"]}
    assert callable(table("both", "pointwise")[names[1]])
    info |= {"operators": {"router": ["cuda"]}, "unavailable": {"cuda": "no GPU", "triton": "no GPU"}}
    rows = table("forward")
    assert rows["seemore-fast cuda, in a graph"] == "no GPU" and list(rows)[-1] == "seemore-fast reference"


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["norm_pointwise", "router"])
def test_compiled_peers(bench, tmp_path, operator):
    """Not calibrate, whose backward torch 2.13 does not compile for a small map of one pixel."""
    bench(operator, "--results", tmp_path, "--compile")
    for rows in figures(next(tmp_path.glob("*/*.json"))).values():
        assert rows["torch.compile"]["ms"] > 0


def run_pytest(tmp_path, *options):
    """Run `pytest benchmarks/` on tiny cases; return status, output, and pytest-benchmark's JSON by test."""
    path = tmp_path / "benchmark.json"
    command = ["-q", "-p", "no:cacheprovider", str(BENCHMARKS), "--bench-quick", "--bench-device", "cpu"]
    command += ["--benchmark-json", str(path), *options]
    done = processes.run(pytest.main, command, output=tmp_path / "printed")
    return *done, {test["name"]: test for test in json.loads(path.read_text())["benchmarks"]}


def test_pytest_runs_every_benchmark(tmp_path):
    status, printed, tests = run_pytest(tmp_path)
    assert status == 0, printed
    for name, test in tests.items():
        extra = test["extra_info"]
        assert extra["gb_s"] > 0 and extra["of_copy"] > 0 and extra["max_error"] < 0.5
        assert extra.get("gflop_s", 0) > 0 or ("[router" in name and "backward" in name)
    expected = {
        f"test_speed[{name}-{title}-{provider}]"
        for name, operator in OPERATORS.items()
        for title in operator.cases()["quick"]
        for provider in (f"seemore-fast {'auto' if operator.block else 'cpu'}", *operators.EAGER)
    }
    assert set(tests) == expected


WRONG_ROUTER = """
from seemore_fast.benchmarks import operators
right = operators.on_backends
def wrong(name, provider, *rest):
    def prepare(tensors):
        index, probability = provider(tensors)()
        return lambda: (index, 1.1 * probability)
    return right(name, prepare, *rest)
operators.on_backends = wrong
"""


def test_pytest_fails_a_wrong_provider(tmp_path, monkeypatch):
    (tmp_path / "break_it.py").write_text(WRONG_ROUTER)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["-p", "break_it", "-k", "router and forward and not striped and not rme"]
    status, printed, tests = run_pytest(tmp_path, *options)
    assert status == 1 and "result 0 errs by" in printed
    assert tests and not any("seemore-fast" in name for name in tests)


# The table of work


@pytest.fixture(scope="module")
def all_work():
    return dict(intensity.all_work())


def counted(function, *arguments, **options):
    """Return the multiply-adds of convolutions and matrices, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments, **options)
    return counter.get_total_flops() / 2


PHOTO = Setting((1, 36, 480, 640), taps=11, recursive=2)
ELEMENTS = 36 * 480 * 640


@pytest.mark.parametrize(
    ("name", "setting", "row"),
    [
        ("striped_conv", PHOTO, "striped_conv K=11, forward"),
        ("striped_conv", PHOTO._replace(gated=True), "striped_conv K=11 gate, forward"),
        ("striped_conv", PHOTO._replace(taps=3, activation="gelu"), "striped_conv K=3 gelu, forward"),
        ("calibrate", PHOTO, "calibrate recursive=2, forward"),
        ("norm_pointwise", PHOTO, "norm_pointwise, forward"),
        ("norm_conv3x3", PHOTO, "norm_conv3x3, forward"),
        ("gated_ffn", PHOTO, "gated_ffn, forward"),
        ("low_rank_experts", PHOTO, "low_rank_experts, forward"),
        ("pointwise", PHOTO, "pointwise, forward"),
        ("conv3x3_shuffle", PHOTO, "conv3x3_shuffle, forward"),
    ],
)
def test_operations_are_as_torch_counts(all_work, name, setting, row):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in input_shapes(name, setting).items()}
    in_torch = counted(getattr(reference, name), **tensors, **OPERATORS[name].options(setting, "meta"))
    in_torch += 4 * ELEMENTS * (name == "calibrate")  # the interpolation, which torch does not count
    assert OPERATORS[name].operations(setting)[0] == 2 * in_torch
    assert ELEMENTS * (all_work[row].vector + all_work[row].matrix) == in_torch


def test_work_of_blocks_is_as_torch_counts(all_work):
    group, elements = SeemoRe(scale=2, **T).eval().body[0], 36 * 480 * 640
    with use_backend("reference"):  # whose experts are those that were chosen
        in_torch = 100 * (counted(group, torch.rand(1, 36, 48, 64)) - 36 * 3)  # without the router's matrix
    blocks = [all_work[f"{name}_block, forward"] for name in ("rme", "sme")]
    ours = elements * sum(work.vector + work.matrix for work in blocks)
    assert ours == in_torch + 4 * elements + elements / 2  # interpolation and pool, which torch does not count


def test_the_readme_has_the_table():
    assert intensity.table() in (BENCHMARKS / "README.md").read_text()

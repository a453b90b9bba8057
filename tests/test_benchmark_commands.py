"""The command lines of the benchmarks: what they run, write and refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import BENCHMARKS
from helpers.benchmarks import figures

from seemore_fast.cli import main


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bench_model(bench, tmp_path, compiled):
    printed = bench("model", "--results", tmp_path, "--compile" if compiled else "--no-compile")
    cases = figures(next(tmp_path.glob("*/model.json")))
    assert len(cases) == 2
    for title, lines in cases.items():
        assert title in printed
        assert lines["seemore-fast"]["ms"] > 0
        assert lines["seemore-fast"]["max_error"] < 1e-5
        assert lines["reference eager"]["x_ours"] > 0
        assert set(lines["published eager"]) & {"ms", "absent"}
        assert ("reference torch.compile" in lines) == compiled


def test_a_partial_run_writes_only_where_it_is_told(bench):
    results = {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*/*")}
    printed = bench("striped_conv", "--case", "K=3")
    assert printed.count("torch eager channels_last") == 3
    assert "figures in" not in printed
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.glob("results/*/*")} == results


def test_what_was_timed_before_a_run_ends_early_is_kept(harness, bench, monkeypatch, tmp_path):
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
    ("name", "options", "message"),
    [
        ("striped_conv", ["--case", "K=4"], "no case has 'K=4' in its title"),
        ("striped_conv", ["--device", "gpu"], "--device is 'gpu', expected auto, cpu, cuda"),
        ("striped_conv", ["--runs", "-3"], "--runs is -3, expected at least 1"),
        ("striped_conv", ["--threads", "0"], "--threads is 0, expected at least 1"),
        ("kernels", ["--device", "mps"], "--device is 'mps', but torch finds no Apple GPU here"),
        ("kernels", ["--case", "K=4"], "no case has 'K=4' in its title"),
        ("training", ["--device", "cuda:99"], "--device is 'cuda:99', "),
        ("training", ["--runs", "0"], "--runs is 0, expected at least 1"),
    ],
)
def test_options_that_cannot_be(bench, capsys, name, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", name, *options]) if name in ("kernels", "training") else bench(name, *options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_ours_being_wrong_is_an_exit_status(harness, bench, monkeypatch, tmp_path):
    wrong = harness.operator(lambda **tensors: tensors["x"])
    monkeypatch.setattr(harness, "ours", lambda *arguments: {"seemore-fast cpu": wrong})
    with pytest.raises(SystemExit, match="seemore-fast is wrong or fails"):
        bench("striped_conv", "--case", "forward", "--results", tmp_path)
    lines = next(iter(figures(next(tmp_path.glob("*/*.json"))).values()))
    assert "errs by" in lines["seemore-fast cpu"]["wrong"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_model.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
    )
    assert done.returncode == 2
    assert "no CUDA device here" in done.stderr
    assert "Traceback" not in done.stderr


def test_upscaling_is_timed_beside_the_network(tmp_path, capsys):
    told = ["benchmark", "upscaling", "--quick", "--device", "cpu", "--turns", "1"]
    assert main([*told, "--results", str(tmp_path)]) == 0
    cases = figures(next(tmp_path.glob("*/upscaling.json")))
    few, large = cases["T x2 6 images 24x24"], cases["T x2 64x48"]
    assert set(few) == {f"seemore-fast {name}" for name in ("network alone", "folder of PNG", "folder of JPEG")}
    assert set(large) == {"seemore-fast whole", "seemore-fast streamed"}
    printed = capsys.readouterr().out
    share = few["seemore-fast network alone"]["ms"] / few["seemore-fast folder of PNG"]["ms"]
    assert share > 0 and f"folder of PNG: {share:.1%} of the network's own speed" in printed
    times = large["seemore-fast streamed"]["ms"] / large["seemore-fast whole"]["ms"]
    assert f"streamed: {times:.2f} times the whole image's time" in printed
    with pytest.raises(SystemExit):
        main([*told[:-1], "0"])
    assert "--turns is 0, expected at least 1" in capsys.readouterr().err

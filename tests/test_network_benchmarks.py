"""Benchmarks of inference and training: providers, counts, refusals and files."""

import contextlib
import faulthandler
import gc
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from helpers import processes
from helpers.benchmarks import figures

from seemore_fast import SeemoRe
from seemore_fast.analysis.operations import PUBLISHED
from seemore_fast.benchmarks import charts, command, inference, network, threads, training
from seemore_fast.cli import main
from seemore_fast.network.config import PRESETS

TINY = network.TINY
PEERS = ["OpenVINO fp32", "ONNX Runtime", "published eager", "published channels_last", "published bf16 autocast"]
QUICK = ["--quick", "--runs", "1", "--threads", "1", "--results"]


def run_quick(kind, folder, *options):
    """Run all tiny cases; return the output and the folder of files."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "PAUSE", 0)
        assert main(["benchmark", kind, *QUICK, str(folder), *options]) == 0
    torch.set_num_threads(threads)
    return printed.getvalue(), next(folder.iterdir())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_quick("inference", tmp_path_factory.mktemp("results"), "--no-compile", "--instruction-sets")


@pytest.fixture
def tiny(harness, monkeypatch, tmp_path):
    """Function that times one tiny network without other packages, which take long; returns its rows."""
    monkeypatch.setattr(inference, "PAUSE", 0)
    for module in ("openvino", "onnxruntime", "seemore.module"):
        monkeypatch.setitem(sys.modules, module, None)

    def run(*options):
        try:
            main(["benchmark", "inference", *QUICK, str(tmp_path), "--case", "tiny 40", *options])
        finally:
            rows = figures(next(tmp_path.glob("*/peers.json")))["tiny 40x32"]
        return rows

    return run


# Inference


def test_work_is_counted_for_every_number_of_threads():
    command = [sys.executable, "-m", "seemore_fast.benchmarks.threads", "--quick", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["T x4 40x32"]
    assert list(found) == [str(count) for count in threads.COUNTS]
    assert all(row["cpu_s"] > 0 and row["work"] == row["cpu_s"] / found["1"]["cpu_s"] for row in found.values())


def test_all_peers_are_correct_and_timed(quick):
    printed, folder = quick
    cases = figures(folder / "peers.json")
    assert list(cases) == list(inference.CASES["quick"])
    rows = cases["tiny 40x32"]
    eager = ["reference eager", "reference eager channels_last"]
    assert {"seemore-fast fp32", "seemore-fast bf16", "OpenVINO bf16", "matmul fp32", *eager, *PEERS} <= set(rows)
    for name, row in rows.items():
        assert set(row) & {"ms", "absent"}, f"{name}: {row}"
        assert name in printed
        if "ms" in row and not name.startswith("matmul "):
            assert row["max_error"] < (0.05 if "bf16" in name else 1e-5)
            assert row["ms_min"] <= row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1] <= row["ms_max"]
            assert min(row["gflop_s"], row["of_matmul"], row["x_ours"]) > 0
    assert rows["seemore-fast bf16"]["x_ours"] == 1, "bf16 is compared with bf16"


def test_growth_is_per_pixel(quick):
    rows = figures(quick[1] / "peers.json")["growth tiny"]
    small, large = (rows[f"seemore-fast {size}"] for size in ("40x32", "80x64"))
    assert small["ns_pixel"] == pytest.approx(small["ms"] * 1e6 / (40 * 32))
    assert large["x_pixel"] == pytest.approx(large["ms"] / small["ms"] / 4)
    published = rows["published channels_last 40x32"]
    assert "absent" in published or {"ns_pixel", "step_mb"} <= set(published)


def test_the_file_contains_machine_and_versions(quick):
    facts = json.loads((quick[1] / "peers.json").read_text())
    assert facts["processor"] and {"onnxruntime", "openvino", "seemore"} <= set(facts["versions"])
    assert facts["backend_info"]["cpu"]["threads"] == 1


def test_the_chart_shows_all_timed_providers(quick):
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(quick[1] / "peers.png") as png:
        assert min(png.size) > 500
    rows = figures(quick[1] / "peers.json")["tiny 40x32"]
    bars = charts.bars(rows)
    assert {bar[0] for bar in bars} == {name for name in rows if "max_error" in rows[name]}
    assert [bar[1] for bar in bars] == sorted(bar[1] for bar in bars)


def run_tiny_and_raise_sigterm(folder):
    faulthandler.enable()  # as pytest does: handlers run on a stack of their own
    inference.PAUSE = 0
    sys.modules |= {"onnxruntime": None, "seemore.module": None}  # others take long
    assert main(["benchmark", "inference", *QUICK, folder, "--case", "tiny 40", "--no-compile"]) == 0
    gc.collect()
    signal.signal(signal.SIGTERM, lambda *_: print("still there"))
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="stacks for signal handlers are Linux's here")
def test_signals_are_handled_afterwards(tmp_path):
    pytest.importorskip("openvino")
    status, printed = processes.run(run_tiny_and_raise_sigterm, str(tmp_path / "out"), output=tmp_path / "printed")
    assert status == 0 and printed.endswith("still there\n"), printed


def test_without_other_packages_their_absence_is_reported(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows, printed = tiny("--no-compile"), capsys.readouterr().out
    for name in [*PEERS, "OpenVINO bf16"]:
        assert "pip install 'seemore-fast[bench]'" in rows[name]["absent"] and rows[name]["absent"] in printed
    assert "pip install --no-deps seemore" in rows["published eager"]["absent"]
    assert "no chart: " in printed and [path.name for path in tmp_path.glob("*/*")] == ["peers.json"]


@pytest.mark.parametrize(("wrong", "by"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_wrong_results_of_ours_are_an_exit_status(tiny, monkeypatch, tmp_path, wrong, by):
    def shifted(model, model_class=SeemoRe, like=network.like):
        model, dtype = like(model, model_class), {"fp32": torch.float32, "bf16": torch.bfloat16}[wrong]
        if model_class is SeemoRe:
            model.register_forward_hook(lambda ours, x, y: y + by * (ours.conv_1.weight.dtype == dtype))
        return model

    monkeypatch.setattr(inference, "like", shifted)
    with pytest.raises(SystemExit, match="seemore-fast is wrong or fails"):
        tiny("--no-compile")
    rows = figures(next(tmp_path.glob("*/peers.json")))["tiny 40x32"]
    refused = [name for name, row in rows.items() if "wrong" in row]
    assert refused == [f"seemore-fast {wrong}"] and "ms" not in rows[refused[0]]


def test_a_wrong_peer_is_refused_and_the_others_are_timed(tiny, monkeypatch):
    wrong = lambda tensors: lambda: torch.rand(1, 3, 64, 80)  # noqa: E731
    monkeypatch.setattr(inference, "published_like", lambda *arguments, **options: wrong)
    rows = tiny("--no-compile")
    assert [name for name, row in rows.items() if "wrong" in row] == [name for name in PEERS if "published" in name]


def test_an_installed_package_writes_to_the_current_folder(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "IS_INSTALLED", True)
    monkeypatch.setitem(inference.CASES, "cpu", {"growth": inference.CASES["quick"]["growth tiny"]})
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "inference", "--runs", "1"]) == 0
    (path,) = tmp_path.glob("*/peers.json")
    assert json.loads(path.read_text())["commit"] is None


@pytest.mark.slow
def test_torch_compile_is_correct(tiny):
    row = tiny("--compile")["reference torch.compile, frozen"]
    assert row["max_error"] < 1e-5 and row["ms"] > 0


# The network and its expected result


def operations(config, expert):
    """Count them at 16x16 pixels with this expert in all groups."""

    def force(group, gate, inputs, choice):
        return torch.full_like(choice[0], expert), choice[1]

    model = network.seeded(config)
    with network.router_hooks(model, "register_forward_hook", force):
        return network.solve(model, torch.rand(1, 3, 16, 16))[1]


@pytest.mark.parametrize("preset, scale", [key for key in PUBLISHED if key[1] != 3])  # 3 does not divide 1280
def test_operations_are_the_published_ones_with_the_largest_expert(preset, scale):
    counted = operations({**PRESETS[preset], "scale": scale}, expert=2)
    pixels = 1280 * 720 // scale**2
    assert round(counted / 2 * pixels / 16**2 / 1e9, 1) == PUBLISHED[preset, scale][1]


def test_operations_are_those_of_the_chosen_experts():
    small, middle, large = (operations(TINY, expert) for expert in range(3))
    rank = 2 * 3 * TINY["num_layers"] * TINY["embedding_dim"] * 16**2  # three matrices; a multiply-add counts two
    assert (large - middle, large - small) == (4 * rank, 6 * rank)


@pytest.mark.parametrize("size", [(40, 32), (33, 70), (96, 96)], ids=str)
def test_routers_are_decided_at_every_size_and_in_bfloat16(size):
    model, choices, margins = network.seeded(TINY), [], []

    def look(group, gate, inputs, choice):
        two = gate.body(inputs[0]).double().softmax(1).topk(2).values[0]
        margins.append((two[0] - two[1]).item())
        choices.append(choice[0].item())

    with torch.no_grad(), network.router_hooks(model, "register_forward_hook", look):
        model(network.image(size))
        model.bfloat16()(network.image(size))
    assert choices == [0, 1] * 2 and min(margins) > 0.5


def test_the_expected_result_is_float64_up_to_a_size(monkeypatch):
    model, x = network.seeded(TINY), network.image((40, 32))
    assert torch.equal(x, x.bfloat16().float())
    exact, operations = network.solve(model, x)
    assert exact.dtype == torch.float64
    monkeypatch.setattr(network, "MAX_FLOAT64_PIXELS", 0)
    near, same = network.solve(model, x)
    assert (near.dtype, same) == (torch.float32, operations)
    torch.testing.assert_close(near.double(), exact, rtol=0, atol=1e-5)


# Training


def test_training_steps_are_correct_and_timed(tmp_path):
    rows = figures(run_quick("training", tmp_path)[1] / "training.json")["tiny 2x16x16"]
    assert {f"{name} {kind} eager" for name in ("reference", "published") for kind in ("fp32", "bf16")} <= set(rows)
    for name, row in rows.items():
        assert set(row) & {"ms", "absent"}, f"{name}: {row}"
        if "ms" in row and "fp32" in name and not name.startswith("matmul "):
            assert row["max_error"] < 1e-4 and row["x_ours"] > 0
    ours, eager = rows["seemore-fast fp32"], rows["reference fp32 eager"]
    assert 0 < ours["saved_mb"] < eager["saved_mb"] / 2
    assert ours["step_mb"] is None or ours["step_mb"] >= 0


@pytest.mark.slow
def test_compiled_training_steps_are_correct(tmp_path):
    pytest.importorskip("seemore.module")
    rows = figures(run_quick("training", tmp_path, "--compile")[1] / "training.json")["tiny 2x16x16"]
    assert all(rows[f"published {kind} torch.compile"]["ms"] > 0 for kind in ("fp32", "bf16"))


def test_models_of_a_gpu(monkeypatch):
    """More of ours than on a CPU: what is recomputed, and torch.compile of the reference."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, **options: model)
    plain = network.seeded(TINY)
    names = list(training.models_of(plain, "", torch.device("cuda"), compile=True))
    ours = ["seemore-fast", "seemore-fast, recompute=none", "seemore-fast, recompute=block"]
    compiled = ["reference eager", "reference torch.compile"]
    assert names == [*ours, *compiled, *(f"published {how}" for how in ("eager", "channels_last", "torch.compile"))]


def test_storages_count_once_and_parameters_not_at_all():
    weight, x = torch.nn.Parameter(torch.ones(1000)), torch.ones(1000)

    def step():
        y = x * weight
        (y * y.view(10, 100).flatten()).sum().backward()

    assert network.saved_megabytes(step) == pytest.approx(0.008)  # x and y, 1000 floats each

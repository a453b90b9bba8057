"""The comparison of inference: what is compared, counted and refused, and what is written."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from helpers.benchmarks import figures

from seemore_fast import SeemoRe
from seemore_fast.analysis.operations import PUBLISHED
from seemore_fast.benchmarks import chart, command, compare_peers
from seemore_fast.cli import main
from seemore_fast.network.presets import PRESETS

TINY = compare_peers.TINY
PEERS = ["OpenVINO fp32", "ONNX Runtime", "published eager", "published channels_last", "published bf16 autocast"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run all tiny cases with the peers that there are; return (what was printed, the folder with the files)."""
    folder, printed, threads = tmp_path_factory.mktemp("results"), io.StringIO(), torch.get_num_threads()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_peers, "PAUSE", 0)
        options = ["--quick", "--runs", "1", "--no-compile", "--instruction-sets", "--threads", "1"]
        assert main(["benchmark", "inference", *options, "--results", str(folder)]) == 0
    torch.set_num_threads(threads)
    return printed.getvalue(), next(folder.iterdir())


@pytest.fixture
def alone(harness, monkeypatch):
    """Without the peers of other packages, which take their time, and without pauses."""
    monkeypatch.setattr(compare_peers, "PAUSE", 0)
    for module in ("openvino", "onnxruntime", "seemore.module"):
        monkeypatch.setitem(sys.modules, module, None)


def run(*options):
    return main(["benchmark", "inference", "--quick", "--runs", "1", "--no-compile", *map(str, options)])


def test_everybody_who_is_there_is_right_and_timed(quick):
    printed, folder = quick
    cases = figures(folder / "peers.json")
    assert list(cases) == list(compare_peers.CASES["quick"])
    lines = cases["tiny 40x32"]
    eager = ["reference eager", "reference eager channels_last"]
    assert {"seemore-fast fp32", "seemore-fast bf16", "OpenVINO bf16", "matmul fp32", *eager, *PEERS} <= set(lines)
    for name, line in lines.items():
        assert set(line) & {"ms", "absent"}, f"{name}: {line}"
        assert name in printed
        if "ms" in line and not name.startswith("matmul "):
            assert line["max_error"] < (0.05 if "bf16" in name else 1e-5)
            assert line["ms_min"] <= line["ms_quartiles"][0] <= line["ms"] <= line["ms_quartiles"][1] <= line["ms_max"]
            assert min(line["gflop_s"], line["of_matmul"], line["x_ours"]) > 0
    own = [lines[f"seemore-fast {precision}"]["x_ours"] for precision in ("fp32", "bf16")]
    assert own[1] == 1, "bf16 is compared with bf16"


def test_growth_is_per_pixel(quick):
    lines = figures(quick[1] / "peers.json")["growth tiny"]
    small, large = (lines[f"seemore-fast {size}"] for size in ("40x32", "80x64"))
    assert small["ns_pixel"] == pytest.approx(small["ms"] * 1e6 / (40 * 32))
    assert large["x_pixel"] == pytest.approx(large["ms"] / small["ms"] / 4)
    published = lines["published channels_last 40x32"]
    assert "absent" in published or {"ns_pixel", "step_mb"} <= set(published)


def test_memory_of_a_call_is_what_it_adds(harness):
    figures = {}
    provider = harness.weighed("x", lambda tensors: lambda: torch.ones(50, 2**18), figures)  # 52 MB
    provider({})
    assert 40 < figures["x"]["step_mb"] < 80
    assert harness.weighed("y", "not installed", figures) == "not installed" and list(figures) == ["x"]


def test_the_file_says_where_and_with_what(quick):
    facts = json.loads((quick[1] / "peers.json").read_text())
    assert facts["processor"]
    assert {"onnxruntime", "openvino", "seemore"} <= set(facts["versions"])
    assert facts["backend_info"]["cpu"]["threads"] == 1


SIGNAL = """
import faulthandler, gc, signal, sys
faulthandler.enable()  # as pytest does: handlers run on a stack of their own
from seemore_fast.cli import main
options = "--quick --runs 1 --no-compile --instruction-sets --threads 1 --results".split()
assert main(["benchmark", "inference", *options, sys.argv[1]]) == 0
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("still there"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stacks for signal handlers are Linux's here")
def test_signals_are_taken_after_it(tmp_path):
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", SIGNAL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("still there\n"), done.stderr[-2000:]


def test_the_chart_shows_what_was_timed(quick):
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(quick[1] / "peers.png") as png:
        assert min(png.size) > 500
    lines = figures(quick[1] / "peers.json")["tiny 40x32"]
    rows = chart.bars(lines)
    assert {row[0] for row in rows} == {name for name in lines if "max_error" in lines[name]}
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)


def test_bars_that_do_not_fit_say_so():
    rows = chart.cut([("a", 1, (0.5, 2), "1 ms"), ("b", 30, (5, 50), "30 ms")])
    assert rows == [("a", 1, (0.5, 2), "1 ms"), ("b", 12, (5, 12), "cut: 30 ms")]


def test_without_matplotlib_there_are_figures(alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--case", "growth", "--results", tmp_path) == 0
    assert "pip install 'seemore-fast[bench]'" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*/*")] == ["peers.json"]


def test_absent_peers_are_named_with_what_installs_them(alone, tmp_path, capsys):
    assert run("--case", "tiny 40", "--results", tmp_path) == 0
    printed = capsys.readouterr().out
    lines = figures(next(tmp_path.glob("*/*.json")))["tiny 40x32"]
    for name in [*PEERS, "OpenVINO bf16"]:
        assert "pip install 'seemore-fast[bench]'" in lines[name]["absent"]
        assert lines[name]["absent"] in printed
    assert "pip install --no-deps seemore" in lines["published eager"]["absent"]


@pytest.mark.parametrize(("wrong", "by"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_ours_being_wrong_is_an_exit_status(alone, monkeypatch, tmp_path, wrong, by):
    def shifted(model):
        dtype, forward = model.conv_1.weight.dtype, SeemoRe.forward

        class Shifted(type(model)):
            def forward(self, x):
                off = by * (self.conv_1.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[wrong])
                return forward(self, x) + off

        assert dtype == torch.float32
        model.__class__ = Shifted
        return model

    like = compare_peers.like
    monkeypatch.setattr(compare_peers, "like", lambda model: shifted(like(model)))
    with pytest.raises(SystemExit, match="seemore-fast is wrong or fails"):
        run("--case", "tiny 40", "--results", tmp_path)
    lines = figures(next(tmp_path.glob("*/*.json")))["tiny 40x32"]
    refused = [name for name, line in lines.items() if "wrong" in line]
    assert refused == [f"seemore-fast {wrong}"]
    assert "ms" not in lines[refused[0]]


def test_a_wrong_peer_is_refused_and_the_others_go_on(alone, monkeypatch, tmp_path):
    def wrong(model, layout, autocast=False):
        return lambda tensors: lambda: torch.rand(1, 3, 64, 80)

    monkeypatch.setattr(compare_peers, "published", wrong)
    assert run("--case", "tiny 40", "--results", tmp_path) == 0
    lines = figures(next(tmp_path.glob("*/*.json")))["tiny 40x32"]
    assert [name for name, line in lines.items() if "wrong" in line] == [name for name in PEERS if "published" in name]


def test_from_a_wheel_results_go_to_the_current_folder(alone, harness, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "IS_INSTALLED", True)
    monkeypatch.setitem(compare_peers.CASES, "cpu", {"growth": compare_peers.CASES["quick"]["growth tiny"]})
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "inference", "--runs", "1"]) == 0
    (path,) = tmp_path.glob("*/peers.json")
    assert json.loads(path.read_text())["commit"] is None


def test_the_command_line_lists_its_options_and_its_kinds(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["benchmark", "inference", "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: seemore-fast benchmark inference")
    assert {"--threads", "--instruction-sets", "--case", "--quick"} <= set(printed.split())
    with pytest.raises(SystemExit) as exit:
        main(["benchmark", "lunch"])
    assert exit.value.code == 2
    assert "inference" in capsys.readouterr().err


def operations(config, expert):
    """Count them at 32x32 pixels with this expert in all groups."""

    def force(group, gate, inputs, choice):
        return torch.full_like(choice[0], expert), choice[1]

    model = compare_peers.seeded(config)
    with compare_peers.hooks(model, "register_forward_hook", force):
        return compare_peers.solve(model, torch.rand(1, 3, 32, 32))[1]


@pytest.mark.parametrize("preset, scale", [key for key in PUBLISHED if key[1] != 3])  # which does not divide 1280
def test_operations_are_the_published_ones_with_the_largest_expert(preset, scale):
    counted = operations({**PRESETS[preset], "scale": scale}, expert=2)
    pixels = 1280 * 720 // scale**2
    assert round(counted / 2 * pixels / 32**2 / 1e9, 1) == PUBLISHED[preset, scale][1]


def test_operations_are_those_of_the_chosen_experts():
    small, middle, large = (operations(TINY, expert) for expert in range(3))
    rank = 2 * 3 * TINY["num_layers"] * TINY["embedding_dim"] * 32**2  # three matrices; a multiply-add counts two
    assert (large - middle, large - small) == (4 * rank, 6 * rank)


@pytest.mark.parametrize("size", [(40, 32), (33, 70), (96, 96)], ids=str)
def test_routers_are_decided_at_every_size_and_in_bfloat16(size):
    model, choices, margins = compare_peers.seeded(TINY), [], []

    def look(group, gate, inputs, choice):
        two = gate.body(inputs[0]).double().softmax(1).topk(2).values[0]
        margins.append((two[0] - two[1]).item())
        choices.append(choice[0].item())

    with torch.no_grad(), compare_peers.hooks(model, "register_forward_hook", look):
        model(compare_peers.image(size))
        model.bfloat16()(compare_peers.image(size))
    assert choices == [0, 1] * 2
    assert min(margins) > 0.5


def test_the_truth_is_float64_until_it_would_not_fit(monkeypatch):
    model, x = compare_peers.seeded(TINY), compare_peers.image((40, 32))
    assert torch.equal(x, x.bfloat16().float())
    exact, operations = compare_peers.solve(model, x)
    assert exact.dtype == torch.float64
    monkeypatch.setattr(compare_peers, "WIDE", 0)
    near, same = compare_peers.solve(model, x)
    assert (near.dtype, same) == (torch.float32, operations)
    torch.testing.assert_close(near.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_is_right(alone, tmp_path):
    options = ["--quick", "--runs", "1", "--case", "tiny 40", "--results", str(tmp_path)]
    assert main(["benchmark", "inference", *options]) == 0
    line = figures(next(tmp_path.glob("*/*.json")))["tiny 40x32"]["reference torch.compile, frozen"]
    assert line["max_error"] < 1e-5
    assert line["ms"] > 0

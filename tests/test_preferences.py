"""The table of measured backends: its effect on the choice, its files, and the command that writes it."""

import json

import pytest
import torch

from seemore_fast import backends, use_backend
from seemore_fast.backends import preferences, selection
from seemore_fast.benchmarks import tune_backends
from seemore_fast.benchmarks.cases import OPERATORS
from seemore_fast.cli import main


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setenv("SEEMORE_FAST_PREFERENCES", str(tmp_path / "own" / "preferences.json"))
    preferences.table.cache_clear()
    yield tmp_path
    preferences.table.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name, on which both backends are."""
    monkeypatch.setattr(preferences, "device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(selection, "unsupported_reason", lambda name, *device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    class OnGpu:
        device, dtype, shape = torch.device("cuda", 0), torch.float32, (1, 4, 8, 8)

        def numel(self):
            return 256

    return OnGpu()


def write(path, operators, device="NVIDIA H200"):
    preferences.write(path, device, operators)


def test_measured_backends_go_first(files, gpu):
    assert backends.select_backend("calibrate", gpu) == "cuda"
    write(files / "shipped.json", {"calibrate": {"float32": ["triton", "reference", "cuda"]}})
    assert backends.select_backend("calibrate", gpu) == "triton"
    assert backends.select_backend("striped_conv", gpu, 3) == "cuda"
    write(preferences.user_file(), {"calibrate": {"float32": ["reference", "cuda"], "float16": ["cuda"]}})
    assert backends.select_backend("calibrate", gpu) == "reference"
    with use_backend("reference"):
        assert backends.select_backend("striped_conv", gpu, 3) == "reference"
    write(preferences.user_file(), {"router": {"float32": ["triton"]}})  # the other operators' entries remain
    write(files / "shipped.json", {"router": {"float32": ["cuda"]}, "gated_ffn": {"float32": ["triton"]}})
    preferred = [
        preferences.preferred(name, gpu.device, torch.float32) for name in ("router", "gated_ffn", "calibrate")
    ]
    assert preferred == [["triton"], ["triton"], ["reference", "cuda"]]


def test_other_devices_and_dtypes_are_not_affected(files, gpu):
    write(files / "shipped.json", {"calibrate": {"float16": ["triton"]}})
    write(files / "shipped.json", {"calibrate": {"float32": ["triton"]}}, device="another")
    assert set(json.loads((files / "shipped.json").read_text())) == {"NVIDIA H200", "another"}
    assert backends.select_backend("calibrate", gpu) == "cuda"
    assert preferences.preferred("calibrate", torch.device("cpu"), torch.float32) is None


def test_a_backend_that_cannot_serve_is_passed_over(files, gpu):
    write(files / "shipped.json", {"norm_pointwise": {"float32": ["cuda", "triton", "reference"]}})
    assert backends.select_backend("norm_pointwise", gpu) == "triton"
    assert backends.select_backend("norm_pointwise", gpu, size=65) == "reference"


def test_backward_uses_the_table_too(files, gpu, monkeypatch):
    write(files / "shipped.json", {"calibrate": {"float32": ["reference", "triton", "cuda"]}})
    monkeypatch.setattr(selection, "_functions", lambda name, operator: {"triton": 3}[name] and backends)
    monkeypatch.setattr(backends, "calibrate_backward", "found", raising=False)
    assert backends.lookup_kernel("calibrate", gpu, part="_backward") == "found"


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"b": {"c": [1]}}}', '{"a": {"b": {"c": 1}}}'])
def test_invalid_files_are_left_out(files, gpu, text):
    (files / "shipped.json").write_text(text)
    with pytest.warns(UserWarning, match=r"shipped\.json is no table of backends.*tune again"):
        assert backends.select_backend("calibrate", gpu) == "cuda"


def test_tune_orders_by_time_and_leaves_out_wrong_backends():
    lines = {
        "seemore-fast cuda": {"ms": 2.0},
        "seemore-fast triton": {"ms": 1.0},
        "seemore-fast triton, in a graph": {"ms": 0.1},
        "torch eager": {"ms": 9.0},
        "torch eager channels_last": {"ms": 3.0},
        "torch.compile": {"ms": 0.5},
        "clone": {"ms": 0.2},
    }
    times = tune_backends.times_of(lines)
    assert times == {"cuda": 2.0, "triton": 1.0, "reference": 3.0}
    assert tune_backends.order({1: times, 2: {"cuda": 1.0, "reference": 9.0, "triton": 3.0}}) == [
        "cuda", "triton", "reference",
    ]  # fmt: skip
    wrong = tune_backends.times_of(lines | {"seemore-fast triton": {"wrong": "result 0", "max_error": 1}})
    assert tune_backends.order({1: times, 2: wrong}) == ["cuda", "reference"]


def test_the_command_measures_and_writes(files, capsys):
    output = files / "new" / "table.json"
    options = ["--device", "cpu", "--quick", "--runs", "1", "--operators", "striped_conv", "router"]
    assert main(["benchmark", "tune", *options, "--output", str(output)]) == 0
    table = json.loads(output.read_text())["cpu"]
    assert set(table["striped_conv"]["float32"]) >= {"reference"} and list(table["router"]) == ["float32"]
    assert str(output) in capsys.readouterr().out
    assert main(["benchmark", "tune", *options[:-2], "calibrate", "--output", str(output)]) == 0
    assert set(json.loads(output.read_text())["cpu"]) == {"striped_conv", "router", "calibrate"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "torch finds no CUDA device here"),
        (["--device", "gpu"], "--device is 'gpu', expected"),
        (["--device", "cpu", "--runs", "0"], "--runs is 0"),
        (["--device", "cpu", "--quick"], "--quick does not measure real sizes"),
    ],
)
def test_invalid_options(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "tune", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_settings_are_photos_and_patches():
    for name in tune_backends.TUNED:
        modes = {(s.mode, s.dtype) for s in tune_backends.settings_of(OPERATORS[name], quick=False)}
        assert {("forward", torch.bfloat16), ("both", torch.bfloat16), ("forward", torch.float16)} <= modes

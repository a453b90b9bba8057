"""The table of measured backends: who is asked first, where it comes from, and how it is made."""

import json

import pytest
import torch

from seemore_fast import backends, use_backend
from seemore_fast.backends import preferences, selection
from seemore_fast.benchmarks import tune_backends
from seemore_fast.benchmarks.cases import OPERATORS
from seemore_fast.cli import main

X = torch.empty(1, 4, 8, 8, device="meta")


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


def test_what_was_measured_goes_first(files, gpu):
    assert backends.select_backend("calibrate", gpu) == "cuda"
    write(files / "shipped.json", {"calibrate": {"float32": ["triton", "reference", "cuda"]}})
    assert backends.select_backend("calibrate", gpu) == "triton"
    assert backends.select_backend("striped_conv", gpu, 3) == "cuda"
    write(preferences.user_file(), {"calibrate": {"float32": ["reference", "cuda"], "float16": ["cuda"]}})
    assert backends.select_backend("calibrate", gpu) == "reference"
    with use_backend("reference"):
        assert backends.select_backend("striped_conv", gpu, 3) == "reference"


def test_other_devices_and_dtypes_are_not_concerned(files, gpu):
    write(files / "shipped.json", {"calibrate": {"float16": ["triton"]}})
    write(files / "shipped.json", {"calibrate": {"float32": ["triton"]}}, device="another")
    assert set(json.loads((files / "shipped.json").read_text())) == {"NVIDIA H200", "another"}
    assert backends.select_backend("calibrate", gpu) == "cuda"
    assert preferences.preferred("calibrate", torch.device("cpu"), torch.float32) is None


def test_a_backend_that_cannot_serve_is_passed_over(files, gpu):
    write(files / "shipped.json", {"norm_pointwise": {"float32": ["cuda", "triton", "reference"]}})
    assert backends.select_backend("norm_pointwise", gpu) == "triton"
    assert backends.select_backend("norm_pointwise", gpu, size=65) == "reference"


def test_a_backward_goes_by_it_too(files, gpu, monkeypatch):
    write(files / "shipped.json", {"calibrate": {"float32": ["reference", "triton", "cuda"]}})
    monkeypatch.setattr(selection, "_functions", lambda name, operator: {"triton": 3}[name] and backends)
    monkeypatch.setattr(backends, "calibrate_backward", "found", raising=False)
    assert backends.lookup_kernel("calibrate", gpu, part="_backward") == "found"


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"b": {"c": [1]}}}', '{"a": {"b": {"c": 1}}}'])
def test_a_file_that_is_no_table_is_left_out(files, gpu, text):
    (files / "shipped.json").write_text(text)
    with pytest.warns(UserWarning, match=r"shipped\.json is no table of backends.*tune again"):
        assert backends.select_backend("calibrate", gpu) == "cuda"


def test_tune_orders_by_time_and_leaves_out_what_is_wrong():
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


def test_the_command_needs_a_gpu_and_a_place(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for options, said in {
        (): "torch finds no CUDA device here",
        ("--device", "gpu"): "--device is 'gpu', expected",
        ("--device", "cpu", "--runs", "0"): "--runs is 0",
        ("--device", "cpu", "--quick"): "--quick does not measure real sizes",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["benchmark", "tune", *options])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_what_the_user_did_not_measure_is_as_shipped(files, gpu):
    write(files / "shipped.json", {"calibrate": {"float32": ["triton"]}, "router": {"float32": ["triton"]}})
    write(preferences.user_file(), {"router": {"float32": ["cuda"]}})
    assert preferences.preferred("calibrate", gpu.device, torch.float32) == ["triton"]
    assert preferences.preferred("router", gpu.device, torch.float32) == ["cuda"]


def test_settings_are_photos_and_patches():
    for name in tune_backends.TUNED:
        modes = {(s.mode, s.dtype) for s in tune_backends.settings_of(OPERATORS[name], quick=False)}
        assert {("forward", torch.bfloat16), ("both", torch.bfloat16), ("forward", torch.float16)} <= modes

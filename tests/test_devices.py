"""What serves a GPU depends on that GPU and on torch's build and switches; GPUs are stubs here."""

import importlib.metadata
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import processes

from seemore_fast import backends
from seemore_fast.backends import native, preferences, report, selection
from seemore_fast.benchmarks import tune_backends

UNFIT = "the driver or the GPU does not fit: no kernel image"


class OnGpu:
    """A float32 image on GPU `index`, as far as `choose` looks at it."""

    dtype, shape = torch.float32, (1, 4, 8, 8)

    def __init__(self, index):
        self.device = torch.device("cuda", index)

    def numel(self):
        return 256


@pytest.fixture
def gpus(monkeypatch):
    """GPU 0 is a T4 that the CUDA library was not built for, GPU 1 an H200 that it was."""
    asked = []
    monkeypatch.setattr(selection, "_missing_reason", lambda name: None)
    monkeypatch.setattr(selection, "interpreted", lambda: False)
    monkeypatch.setattr(native, "cuda_unsupported_reason", lambda i: asked.append(i) or [UNFIT, None][i])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(7, 5), (9, 0)][i])
    monkeypatch.setattr(preferences, "preferred", lambda *_: None)
    return asked


def test_each_gpu_is_judged_by_itself(gpus):
    assert backends.unsupported_reason("cuda", torch.device("cuda", 0)) == UNFIT
    assert backends.unsupported_reason("cuda", torch.device("cuda", 1)) is None
    assert [backends.select_backend("calibrate", OnGpu(i)) for i in (0, 1)] == ["triton", "cuda"]
    assert [backends.backend_for_device(f"cuda:{i}") for i in (0, 1)] == ["triton", "cuda"]


def test_no_gpu_is_asked_but_that_of_the_tensor(gpus):
    assert backends.unsupported_reason("cuda") is None and not gpus
    backends.select_backend("calibrate", OnGpu(1))
    assert set(gpus) == {1}


def test_triton_multiplies_matrices_only_where_it_uses_matrix_units(gpus):
    for operator, kernels in backends.KERNELS.items():
        if any(kernel.backend == "triton" and kernel.most == 64 for kernel in kernels):
            assert [backends.select_backend(operator, OnGpu(i)) for i in (0, 1)] == ["reference", "triton"], operator


def test_a_gpu_that_is_older_than_tritons_kernels_takes_the_reference(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (6, 1))
    assert {backends.select_backend(operator, OnGpu(0)) for operator in backends.KERNELS} == {"reference"}


def test_a_gpu_may_become_usable(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable NVIDIA GPU" in backends.unsupported_reason(
        "cuda"
    ) and "TRITON_INTERPRET" in backends.unsupported_reason("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.unsupported_reason("cuda") is backends.unsupported_reason("triton") is None


def test_rocm_is_told_apart_from_cuda(monkeypatch):
    """torch.cuda.is_available() is true there, and AMD's Triton refuses products in three times TF32."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selection, "interpreted", lambda: False)
    monkeypatch.setattr(preferences, "preferred", lambda *_: None)
    selection._missing_reason.cache_clear()
    try:
        assert "ROCm" in backends.unsupported_reason("triton")
        assert backends.unsupported_reason("cuda") == "torch is built without CUDA"
        assert backends.select_backend("calibrate", OnGpu(0)) == "reference"
    finally:
        selection._missing_reason.cache_clear()


@pytest.mark.parametrize("name", ["triton", "triton-windows", "pytorch-triton"])
def test_triton_is_known_by_the_name_of_its_package(monkeypatch, name):
    def version(asked):
        if asked != name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return "3.6.0"

    monkeypatch.setattr(report, "version", version)
    assert report._triton_info() == "3.6.0"


# Switches of torch's precision

SWITCHES = {  # what is set: how float32 is multiplied then; None where versions of torch differ
    "pass": "tf32",
    "torch.backends.cudnn.allow_tf32 = False": "tf32x3",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": "tf32x3",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cudnn.fp32_precision = 'ieee'": None,
    "torch.backends.fp32_precision = 'ieee'; torch.backends.cudnn.conv.fp32_precision = 'ieee'": "tf32x3",
    "torch.set_float32_matmul_precision('highest')": "tf32",
}


def print_precisions(switch):
    from seemore_fast.kernels.tiles import precision
    from seemore_fast.network.graphs import size_of

    exec(switch)
    size_of(torch.empty(1))
    print(*map(precision, (torch.float32, torch.bfloat16, torch.float16)))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_torch_is_followed(switch, tmp_path):
    """In a process of its own: reading an old switch raises for ever once a new one is set."""
    pytest.importorskip("triton")
    status, printed = processes.run(print_precisions, switch, output=tmp_path / "printed")
    assert status == 0, printed
    wide, *narrow = printed.split()
    assert narrow == ["tf32x3", "tf32x3"]
    assert wide == SWITCHES[switch] or (SWITCHES[switch] is None and wide in ("tf32", "tf32x3"))


def test_graphs_are_not_shared_among_precisions(monkeypatch):
    from seemore_fast.network.graphs import size_of

    x, before = torch.empty(1), torch.backends.cudnn.conv.fp32_precision
    try:
        sizes = set()
        for how in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = how
            sizes.add(size_of(x))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert len(sizes) == 2


# A user without a home folder


@pytest.fixture
def homeless(monkeypatch):
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    for name in ("XDG_CACHE_HOME", "SEEMORE_FAST_PREFERENCES"):
        monkeypatch.delenv(name, raising=False)
    preferences.table.cache_clear()
    yield monkeypatch
    preferences.table.cache_clear()


def test_without_a_home_folder_what_is_shipped_counts(homeless, tmp_path):
    homeless.setattr(preferences, "SHIPPED", tmp_path / "shipped.json")
    preferences.write(preferences.SHIPPED, "a GPU", {"router": {"float32": ["cuda"]}})
    assert preferences.user_file() is None
    assert preferences.table() == {"a GPU": {"router": {"float32": ["cuda"]}}}
    homeless.setenv("SEEMORE_FAST_PREFERENCES", str(tmp_path / "own.json"))
    assert preferences.user_file() == tmp_path / "own.json"


def test_without_a_home_folder_tune_says_where_to_write(homeless, capsys):
    with pytest.raises(SystemExit):
        tune_backends.main(["--device", "cpu", "--operators", "router"])
    assert "give --output, or set SEEMORE_FAST_PREFERENCES" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_no_table(homeless, tmp_path):
    homeless.setattr(preferences, "SHIPPED", tmp_path / "shipped.json")
    preferences.SHIPPED.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is no table of backends"):
        assert preferences.table() == {}

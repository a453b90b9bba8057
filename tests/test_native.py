"""When the CUDA library is loaded and its devices are asked, with stubs where a GPU would be; what a build left out."""

import json
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from seemore_fast.backends import native, report


class Devices:
    """GPUs that are counted, made current and asked; `reasons` are answers by index, or errors to raise."""

    def __init__(self, reasons):
        self.reasons, self.current, self.asked = reasons, 0, []

    def guard(self, index):
        devices = self

        class Guard:
            def __enter__(self):
                self.before, devices.current = devices.current, index

            def __exit__(self, *exception):
                devices.current = self.before

        return Guard()

    def unsupported_reason(self):
        self.asked.append(self.current)
        answer = self.reasons[self.current]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def devices(monkeypatch):
    devices = Devices({0: "", 1: "no kernel image", 2: RuntimeError("out of memory\nbacktrace")})
    monkeypatch.setattr(native, "_cuda_reasons", {})
    monkeypatch.setattr(native, "load", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", devices.guard)
    monkeypatch.setattr(torch.ops, "seemore_cuda", types.SimpleNamespace(unsupported_reason=devices.unsupported_reason))
    return devices


def test_loading_asks_no_device(devices):
    assert native.load_cuda() is None
    assert devices.asked == []


def test_each_device_answers_for_itself_once(devices):
    for _ in range(2):
        assert native.cuda_unsupported_reason(1) == "no kernel image"
        assert native.cuda_unsupported_reason(0) is None
    assert devices.asked == [1, 0]
    assert devices.current == 0


def test_an_error_that_may_pass_is_not_remembered(devices):
    assert native.cuda_unsupported_reason(2) == "CUDA device 2 does not answer: out of memory"
    devices.reasons[2] = ""
    assert native.cuda_unsupported_reason(2) is None
    assert devices.asked == [2, 2]


@pytest.mark.parametrize(
    "change, reason",
    [
        ((torch.version, "cuda", None), "torch is built without CUDA"),
        ((native, "load", lambda path: f"{path.name} was not built"), "libseemore_cuda.so was not built"),
    ],
)
def test_reasons_against_every_device(devices, monkeypatch, change, reason):
    monkeypatch.setattr(*change)
    assert native.load_cuda() == reason
    assert devices.asked == []


# A driver whose answer is given by name, where csrc/cuda/common/unsupported_reason.cu would ask a real one
DRIVER = """
#define __CUDACC__
#define __global__ [[maybe_unused]]
#include <cstdio>
#include <exception>
#include <string>
enum cudaError_t { cudaSuccess, NAMES };
struct cudaFuncAttributes {};
cudaError_t answer, last;
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return last = answer; }
cudaError_t cudaGetLastError() { const auto error = last; last = cudaSuccess; return error; }
const char* cudaGetErrorString(cudaError_t) { return "text"; }
#include "cuda/common/unsupported_reason.cu"
int main(int, char** arguments) {
  answer = static_cast<cudaError_t>(std::stoi(arguments[1]));
  try {
    std::printf("%s", seemore::unsupported_reason().c_str());
  } catch (const std::exception& error) {
    std::printf("thrown: %s", error.what());
  }
  return last;  // an error left behind would be the next launch's
}
"""
LASTING = [
    "cudaErrorInsufficientDriver", "cudaErrorInvalidDeviceFunction", "cudaErrorInvalidKernelImage",
    "cudaErrorInvalidPtx", "cudaErrorJitCompilationDisabled", "cudaErrorJitCompilerNotFound",
    "cudaErrorNoKernelImageForDevice", "cudaErrorSystemDriverMismatch", "cudaErrorUnsupportedPtxVersion",
]  # fmt: skip


def test_only_errors_of_the_build_and_the_device_are_answers(tmp_path):
    """The others, which may pass, are thrown, so that they are asked for again."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    names = [*LASTING, "cudaErrorMemoryAllocation", "cudaErrorDevicesUnavailable"]
    (tmp_path / "driver.cpp").write_text(DRIVER.replace("NAMES", ", ".join(names)))
    program = tmp_path / "driver"
    include = f"-I{Path(__file__).parents[1] / 'csrc'}"
    subprocess.run([compiler, "-std=c++17", include, tmp_path / "driver.cpp", "-o", program], check=True)
    for number, name in enumerate(["cudaSuccess", *names]):
        answer = subprocess.run([program, str(number)], capture_output=True, text=True, check=True).stdout
        lasting = "the driver or the GPU does not fit: text" if name in LASTING else "thrown: text"
        assert answer == ("" if name == "cudaSuccess" else lasting), name


# build_info.json


@pytest.fixture
def info(monkeypatch, tmp_path):
    """Return a function that writes build_info.json where native looks for it."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    facts = {"compiler": "g++ 12", "instruction_sets": ["portable"], "nvcc": None, "cuda_architectures": []}
    return lambda **changes: (tmp_path / "build_info.json").write_text(json.dumps({**facts, "left_out": {}, **changes}))


def test_a_library_that_was_left_out_says_why(info, tmp_path):
    info(left_out={"libseemore_cuda": "there is no nvcc"})
    reason = native.load(tmp_path / "libseemore_cuda.so")
    assert reason.startswith("libseemore_cuda.so was not built: there is no nvcc; ")
    assert "--no-cache-dir" in reason and "SEEMORE_FAST_CUDA=1" in reason
    assert native.load(tmp_path / "libseemore_cpu.so").startswith("libseemore_cpu.so was not built; ")
    assert native.build_info()["left_out"] == {"libseemore_cuda": "there is no nvcc"}


@pytest.mark.parametrize("text", [None, "", "not JSON"])
def test_without_build_info_nothing_is_known(monkeypatch, tmp_path, text):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    if text is not None:
        (tmp_path / "build_info.json").write_text(text)
    assert native.build_info().startswith("not known: ")
    assert native.load(tmp_path / "libseemore_cuda.so").startswith("libseemore_cuda.so was not built; ")
    assert native.architecture_reason((9, 0)) is None


@pytest.mark.parametrize(
    "built, runs, does_not",
    [
        (["8.0", "9.0"], [(8, 0), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        (["8.6"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["8.0", "9.0+PTX"], [(8, 0), (9, 0), (10, 3), (11, 0), (12, 1)], [(7, 5)]),
        (["9.0a+PTX"], [(9, 0)], [(8, 9), (10, 0)]),
        (["10.0f"], [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ([], [(7, 5), (12, 0)], []),
    ],
)
def test_which_gpus_there_is_code_for(info, built, runs, does_not):
    info(cuda_architectures=built)
    for capability in runs:
        assert native.architecture_reason(capability) is None, capability
    for capability in does_not:
        expected = f"built for {' '.join(built)}, the GPU is {capability[0]}.{capability[1]}"
        assert native.architecture_reason(capability) == expected


def test_architectures_are_compared_and_no_device_asked(info, devices, monkeypatch):
    info(cuda_architectures=["9.0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    cuda = report._cuda_info()
    assert cuda["devices"] == ["GPU 0", "GPU 1"]
    assert cuda["without_cuda_library"] == {1: "built for 9.0, the GPU is 8.0"}
    assert devices.asked == []

"""The CUDA kernels compile for every architecture, all of their variables in registers."""

import os
import re

import pytest
from helpers import CSRC
from helpers.nvcc import FIGURES, KERNEL, built, compile_with_nvcc, compiled

SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))
CASES = [(source, architecture) for source in SOURCES for architecture in (75, 80, 86, 89, 90, 100, 120)]
EACH = [  # nvcc takes 4 s for each, so that most are slow where the library was not built in this tree
    pytest.param(*of, id=f"{of[0].stem}-{of[1]}", marks=[] if of[1] == 90 or built(*of) else pytest.mark.slow)
    for of in CASES
]

WITHOUT = {"shared"}  # not printed where it is 0

# How many warps of these a multiprocessor is to hold at least, of two in a block: what hides the time of reading. The
# last number of their names says how many neighbours they read at once.
WARPS = {
    r"striped_conv_sweep_forward.*Li11ELi[24]E": 12,
    r"striped_conv_sweep_forward.*Li3ELi[24]E": 16,
    r"striped_conv_sweep_backward_\w+Li(3|7|11)ELi[24]E": 12,
    r"striped_conv_sweep_backward_row.*Li3ELi[24]E": 16,
    r"striped_conv_sweep_\w+ELi1EE": 8,
}
BLOCK_WARPS = 2
MOST = {75: 14}  # by 64 KB for blocks of 9 KB of shared memory
SHARED = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB of a multiprocessor
BLOCKS = {75: 16, 80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}  # on a multiprocessor, at most


def resources(report: str, architecture: int) -> dict[str, dict[str, int]]:
    """Return what ptxas reports of each kernel for an architecture."""
    _, *parts = KERNEL.split(report)
    kernels = {}
    for name, compiled_for, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if int(compiled_for) != architecture:
            continue
        found = {what: pattern.search(text) for what, pattern in FIGURES.items()}
        missing = [what for what, match in found.items() if not match and what not in WITHOUT]
        assert not missing, f"ptxas does not tell {missing} of {name}: {text}"
        kernels[name] = {what: int(match[1]) if match else 0 for what, match in found.items()}
    return kernels


@pytest.mark.parametrize("source, architecture", EACH)
def test_everything_in_registers(source, architecture):
    _, report = compiled(source, architecture)
    kernels = resources(report, architecture)
    assert "warning" not in report
    assert len(kernels) >= source.read_text().count("__global__ ")
    for name, used in kernels.items():
        assert (used["stack"], used["spill stores"], used["spill loads"]) == (0, 0, 0), f"{name}: {used}"
        assert 0 < used["registers"] <= 255 and used["shared"] <= 48 * 1024, f"{name}: {used}"
        for pattern, least in WARPS.items():
            if re.search(pattern, name):
                assert warps(used, architecture) >= min(least, MOST.get(architecture, least)), f"{name}: {used}"


def warps(used: dict[str, int], architecture: int) -> int:
    """Return how many warps of a kernel with BLOCK_WARPS to a block a multiprocessor holds at once."""
    registers = -(-used["registers"] * 32 // 256) * 256  # a warp's: given out in units of 256
    by_registers = 4 * (16 * 1024 // registers) // BLOCK_WARPS  # each of four schedulers has its own
    reserved = 1024 if architecture >= 80 else 0  # bytes of a block that the system keeps, since compute capability 8.0
    by_shared = SHARED[architecture] * 1024 // max(used["shared"] + reserved, 1)
    return BLOCK_WARPS * min(by_registers, by_shared, BLOCKS[architecture])


def test_warps_of_a_multiprocessor():
    assert warps({"registers": 168, "shared": 10240}, 90) == 12
    assert warps({"registers": 128, "shared": 9216}, 90) == 16
    assert warps({"registers": 96, "shared": 30 * 1024}, 86) == 6
    assert warps({"registers": 16, "shared": 0}, 75) == 32
    assert warps({"registers": 162, "shared": 10240}, 75) == 12
    assert warps({"registers": 128, "shared": 10240}, 86) == 16


@pytest.mark.parametrize("pattern", WARPS)
def test_every_limit_is_some_kernel_s(pattern):
    names = [name for source in SOURCES for name in resources(compiled(source, 90)[1], 90)]
    assert any(re.search(pattern, name) for name in names)


def test_there_are_sources():
    assert SOURCES


def test_memory_that_is_no_register_is_found(tmp_path):
    """An array with computed indices needs a stack frame, many values in few registers spill."""
    (tmp_path / "wrong.cu").write_text(
        """
        __global__ void frame(float* x, const int* index) {
          float values[64];
          for (int i = 0; i < 64; ++i) values[i] = x[i];
          for (int i = 0; i < 64; ++i) x[i] = values[index[i]];
        }
        __global__ void spill(float* x) {
          float values[64];
          for (int i = 0; i < 64; ++i) values[i] = x[i * blockDim.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i) x[i * blockDim.x] = values[63 - i];
        }
        __global__ void shared(float* x) {
          __shared__ float values[1024];
          values[threadIdx.x] = x[threadIdx.x];
          __syncthreads();
          x[threadIdx.x] = values[1023 - threadIdx.x];
        }
        """
    )
    report = compile_with_nvcc(tmp_path / "wrong.cu", 90, os.devnull, "-maxrregcount=32")
    used = {
        kernel: figures
        for name, figures in resources(report, 90).items()
        for kernel in ("frame", "spill", "shared")
        if kernel in name
    }
    assert used["frame"]["stack"] >= 256
    assert used["spill"]["spill stores"] > 0
    assert used["spill"]["spill loads"] > 0
    assert used["shared"]["shared"] == 4096
    assert used["shared"]["stack"] == 0

"""The GELU of the CPU engine where its result is rounded to bfloat16, against erf, by each instruction set."""

import ctypes
import math
import subprocess

import pytest
import torch
from helpers import CSRC
from helpers.native_build import native as build

from seemore_fast.backends import native

SOURCE = """
#include "cpu/simd/math.h"
using namespace seemore::SEEMORE_ISA;
extern "C" void gelu(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) store(y + i, gelu_to_16_bits(load(x + i)));
}
"""


@pytest.fixture(scope="module", params=list(build.INSTRUCTION_SETS))
def gelu(request, tmp_path_factory):
    """Function of float32 tensors."""
    name = request.param
    if native.load_cpu() or name not in native.instruction_sets():
        pytest.skip(f"no {name} on this processor")
    folder = tmp_path_factory.mktemp("gelu")
    (folder / "gelu.cpp").write_text(SOURCE)
    flags = [*build.INSTRUCTION_SETS[name].split(), f"-DSEEMORE_ISA={name}", f"-I{CSRC}"]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-w", *flags, "gelu.cpp", "-o", "gelu.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "gelu.so"))

    def run(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, (0, -len(x) % 16))  # whole vectors
        y = torch.full_like(x, torch.nan)
        library.gelu(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
        return y

    return run


def test_errors_are_a_tenth_of_a_step_of_bfloat16(gelu):
    x = torch.linspace(-12, 12, 48_000)
    expected = torch.nn.functional.gelu(x.double())
    error = (gelu(x) - expected).abs()
    assert error.max() < 6e-4
    step = 2.0 ** (expected.abs().clamp(min=2**-7).log2().floor() - 7)
    assert (error / step)[x > 0].max() < 0.1


def test_the_ends(gelu):
    x = torch.tensor([0.0, 4, -4, 100, -100, 1e38, -1e38, math.inf])
    assert gelu(x)[: len(x)].tolist() == [0, 4, 0, 100, 0, torch.tensor(1e38).item(), 0, math.inf]
    assert gelu(torch.tensor([math.nan, -math.inf]))[:2].isnan().all()  # as torch has it

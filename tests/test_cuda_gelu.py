"""The short GELU of CUDA kernels with 16-bit results, against erf; PTX's ex2.approx by its largest error."""

import ctypes
import math

import pytest
import torch
from helpers import cuda_host
from helpers.cuda_host import available


@pytest.fixture(scope="module")
def short_gelu():
    sources = [cuda_host.HERE / "gelu.cu"]
    library = ctypes.CDLL(str(available(cuda_host.compile_library, "gelu", sources, cuda_host.CACHE)))

    def run(x: torch.Tensor) -> torch.Tensor:
        result = torch.full_like(x, torch.nan)
        library.gelu(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(result.data_ptr()), x.numel())
        return result

    return run


def test_errors_are_a_quarter_of_what_rounding_to_float16_makes(short_gelu):
    x = torch.linspace(-12, 12, 480_001)
    expected = torch.nn.functional.gelu(x.double())
    error = (short_gelu(x) - expected).abs()
    assert error.max() < 3.1e-5
    half_a_unit = 2.0 ** (expected.abs().clamp(min=2**-14).log2().floor() - 11)  # of float16
    assert (error / half_a_unit)[x > 0].max() < 0.26
    assert error[expected.abs() < 1e-3].max() < 2.5e-5


def test_the_ends(short_gelu):
    x = torch.tensor([0.0, 1e-30, -1e-30, 100, -100, 3e38, -3e38, math.inf])
    assert short_gelu(x).tolist() == pytest.approx([0, 5e-31, -5e-31, 100, 0, 3e38, 0, math.inf], rel=1e-6, abs=0)
    assert short_gelu(torch.tensor([math.nan, -math.inf])).isnan().all()  # as torch has it

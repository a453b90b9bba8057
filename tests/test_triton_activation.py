"""GELU and its derivative as Triton's kernels compute them, in float32, against float64's."""

import pytest
import torch
from helpers.backends import running_on

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from seemore_fast.kernels.activation import activate, slope

POINTS = 1024


@triton.jit
def evaluate(y, dy, x, dtype: tl.constexpr, POINTS: tl.constexpr):
    index = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    s = tl.load(x + index)
    tl.store(y + index, activate(s, "gelu", dtype))
    tl.store(dy + index, slope(s, "gelu", dtype))


def gelu(x: torch.Tensor, dtype: tl.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GELU and GELU' of x, as they are before they are rounded to dtype."""
    y, dy = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    evaluate[(len(x) // POINTS,)](y, dy, x, dtype, POINTS)
    return y.double(), dy.double()


@pytest.mark.parametrize(
    "dtype, relative, absolute, of_slope",
    [(tl.float32, 3e-7, 1e-6, 3e-7), (tl.float16, 6e-5, 3e-5, 4e-5), (tl.bfloat16, 6e-5, 3e-5, 4e-5)],
    ids=["float32", "float16", "bfloat16"],
)
def test_error(device, dtype, relative, absolute, of_slope):
    """For 16 bits it stays below a quarter of half a unit of float16, which is 2^-12 to 2^-11 of a number."""
    # from the least normal number on, near 0 and in both tails, beyond where erf is 1
    sizes = torch.cat(
        [torch.logspace(-37, 0, POINTS), torch.linspace(0, 12, 6 * POINTS), torch.logspace(1, 4.8, POINTS)]
    )
    x = torch.cat([sizes, -sizes]).float().to(device)
    with running_on("triton", device):
        y, dy = gelu(x, dtype)
    exact = x.double().requires_grad_()
    truth = torch.nn.functional.gelu(exact)
    (slope_truth,) = torch.autograd.grad(truth.sum(), exact)
    error = (y - truth.detach()).abs()
    assert (error <= relative * truth.detach())[x > 0].all()
    assert (error[x < 0] <= absolute).all() and ((dy - slope_truth).abs() <= of_slope).all()


@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16], ids=["float32", "bfloat16"])
def test_infinities_and_nan(device, dtype):
    """As float64 has them: no infinity meets 0 before the last product."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 0, 1e-38, -1e-38], device=device)
    with running_on("triton", device):
        y, dy = gelu(x.repeat(POINTS // len(x)), dtype)
    torch.testing.assert_close(y[: len(x)], torch.nn.functional.gelu(x.double()), equal_nan=True)
    assert dy[3] == 1 and dy[4] == 0 and dy[5] == 0.5

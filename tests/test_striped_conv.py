"""striped_conv: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import naive_gelu
from helpers.ops import assert_values, cast
from helpers.table import BY_NAME

from seemore_fast import reference
from seemore_fast.ops import striped_conv

CASE = BY_NAME["striped_conv"]


@each_backend("striped_conv")
def test_pixels_outside_are_zero_in_both_steps(backend, device):
    """One pixel of 0, bias_row 1, all taps 1: the column step sees bias_row once, zeros above and below."""
    ones = torch.ones(1, 1, 1, 3, dtype=backend.widest, device=device)
    one, zero = ones[0, 0, 0, :1], ones.new_zeros(1)
    with running_on(backend, device):
        y = striped_conv(zero[None, None, None], ones, one, ones.transpose(2, 3), zero)
    assert y.tolist() == [[[[1.0]]]]


@each_kernel("striped_conv", interpreted=False)
def test_gelu_and_its_gradient_everywhere(backend, device):
    x = torch.linspace(-15, 15, 60_001, device=device)
    one, zero = torch.tensor([[[[0.0, 1, 0]]]], device=device), torch.zeros(1, device=device)
    image = x.view(1, 1, 1, -1).requires_grad_()
    with running_on(backend, device):
        y = striped_conv(image, one, zero, one.transpose(2, 3), zero, activation="gelu")
        (gradient,) = torch.autograd.grad(y.sum(), image)
    exact = x.double().requires_grad_()
    expected = naive_gelu(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(y.flatten().double(), expected.detach(), rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(gradient.flatten().double(), expected_gradient, rtol=2e-7, atol=5e-7)


@each_kernel("striped_conv", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [3, 7, 11])
@pytest.mark.parametrize("width", [16, 48, 61, 64])
def test_slices_of_channels(backend, device, dtype, taps, width):
    """Chunks of one tensor: rows of whole vectors may be read where they are."""
    tensors, options = CASE.call(device, dtype, shape=(2, 3, 21, width), taps=taps, activation="gelu")
    x, gate = torch.cat([tensors["x"], tensors["gate"]], dim=1).chunk(2, dim=1)
    assert_values(backend, CASE, tensors | {"x": x, "gate": gate}, options)


@each_kernel("striped_conv")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 33, 64), (1, 2, 64, 20), (2, 1, 17, 16), (1, 2, 65, 3)], ids=str)
def test_planes_of_a_training(backend, device, dtype, shape):
    """Triton has kernels of its own for 16-bit planes up to 64x64, in strips of 32 rows."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} has no kernel for {dtype}")
    for options in (dict(activation="gelu", gated=False), dict(activation=None, gated=True)):
        assert_values(backend, CASE, *CASE.call(device, dtype, shape=shape, taps=11, **options))


@each_backend("striped_conv")
def test_autocast_casts_all_tensors(backend, device):
    """As for torch's convolutions, but float64 ones."""
    tensors, options = CASE.call(device, torch.float32, activation="gelu")
    with running_on(backend, device):
        narrow = striped_conv(**cast(tensors, torch.bfloat16), **options)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(striped_conv(**tensors, **options), narrow)
            with pytest.raises(TypeError, match=r"^striped_conv: weight_row has dtype torch.bfloat16, expected .*64"):
                striped_conv(**tensors | {"x": tensors["x"].double()})


@each_kernel("striped_conv")
def test_extreme_values(backend, device, monkeypatch):
    """Infinities and NaN come out where the formula has them."""
    tensors, options = CASE.call(device, torch.float32, shape=(1, 1, 5, 40), taps=3, activation="gelu")
    for column, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30)):
        tensors["x"][0, 0, 2, 6 * column] = value
    with running_on(backend, device):
        y = striped_conv(**tensors, **options)
    # torch's own GELU of infinity is infinity or NaN, as the processor has it
    monkeypatch.setattr(torch.nn.functional, "gelu", naive_gelu)
    expected = reference.striped_conv(**tensors, **options)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)

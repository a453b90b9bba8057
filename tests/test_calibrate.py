"""calibrate: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import naive_calibrate, naive_gelu
from helpers.ops import cast, largest_difference, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast import reference
from seemore_fast.ops import calibrate

CASE = BY_NAME["calibrate"]


@each_backend("calibrate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype_of_k(backend, device, dtype):
    """y errs at most twice as much as the reference's; gradients have their own dtypes."""
    tensors, options = CASE.call(device, torch.float32)
    tensors["k"] = tensors["k"].to(dtype)
    exact = naive_calibrate(**cast(tensors, torch.float64), **options)
    with torch.autocast(device, torch.bfloat16):
        expected = reference.calibrate(**tensors, **options)
        with running_on(backend, device):
            found = value_and_gradients(calibrate, tensors, **options)
            with pytest.raises(TypeError, match=r"^calibrate: weight_agg has dtype torch.float32, expected .*float64"):
                calibrate(**tensors | {"k": tensors["k"].double()}, **options)
    assert found["y"].dtype == expected.dtype == dtype
    assert largest_difference(found["y"], exact) <= 2 * largest_difference(expected, exact)
    assert all(found[f"gradient of {name}"].dtype == tensor.dtype for name, tensor in tensors.items())


@each_kernel("calibrate")
@pytest.mark.parametrize("recursive", [1, 2])
def test_extreme_values(backend, device, recursive, monkeypatch):
    """Infinities and NaN come out where the formula has them; what is not gathered stays where it is."""
    tensors, options = CASE.call(device, torch.float32, shape=(2, 2, 37, 50), recursive=recursive)
    tensors["k"][0, 0, 9, 20] = torch.inf
    tensors["k"][1, 1, 3, 30] = torch.nan
    tensors["k"][:, :, 36] = torch.nan
    with monkeypatch.context() as patch:  # torch's own GELU of infinity is infinity or NaN, as the processor has it
        patch.setattr(torch.nn.functional, "gelu", naive_gelu)
        expected = value_and_gradients(reference.calibrate, tensors, **options)
    with running_on(backend, device):
        found = value_and_gradients(calibrate, tensors, **options)
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, equal_nan=True, rtol=1e-4, atol=1e-4)

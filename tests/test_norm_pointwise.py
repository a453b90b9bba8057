"""norm_pointwise and pointwise: what their conformance (test_conformance.py) leaves open."""

import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import naive_norm_pointwise, naive_pointwise
from helpers.ops import cast, largest_difference, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast.ops import norm_pointwise, pointwise


@each_kernel("norm_pointwise")
def test_autocast_rounds_what_is_normalised(backend, device):
    """x is normalised in float32: a mean that dwarfs the deviations does no harm."""
    tensors, _ = BY_NAME["norm_pointwise"].call(device, torch.float32, shape=(2, 36, 6, 7), out=8, offset=1000)
    exact = naive_norm_pointwise(**cast(tensors, torch.float64))
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        found = value_and_gradients(norm_pointwise, tensors)
    assert found["y"].dtype == torch.bfloat16
    assert found["gradient of x"].dtype == found["gradient of weight"].dtype == torch.float32
    assert largest_difference(found["y"], exact) < 2**-6 * exact.abs().max()


@each_backend("norm_pointwise")
def test_autocast_keeps_the_residual_wide(backend, device):
    """The convolution is rounded to bfloat16, the residual stays float32 and so does the sum."""
    tensors, _ = BY_NAME["pointwise"].call(device, torch.float32, shape=(2, 5, 6, 7))
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        y = pointwise(**tensors)
    exact = naive_pointwise(**cast(tensors, torch.float64))
    assert y.dtype == torch.float32
    assert 0 < largest_difference(y, exact) < 2**-6 * exact.abs().max()

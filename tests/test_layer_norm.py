"""layer_norm, a building block that only the reference has: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.naive import naive_layer_norm, per_channel
from helpers.ops import cast, each_narrow_dtype, largest_difference
from helpers.table import LAST, LAYER_NORM

from seemore_fast.reference import layer_norm

CASE = LAYER_NORM
each_layout = pytest.mark.parametrize("layout", LAST["layout"])


@each_narrow_dtype
@each_layout
@pytest.mark.parametrize("spread, offset", [(1, 0), (300, 0), (1, 300), (1000, 1000)])
def test_narrow_dtypes(device, dtype, layout, spread, offset):
    """Squares beyond 256 overflow float16, their mean minus the squared mean cancels: neither may happen."""
    tensors, _ = CASE.call(device, dtype, layout, spread, offset)
    exact = naive_layer_norm(**cast(tensors, torch.float64))
    y = layer_norm(**tensors)
    assert y.dtype == dtype
    # One rounding of the result, and float32's of numbers as large as the offset.
    tolerance = max(torch.finfo(dtype).eps, 5e-7 * (1 + offset / spread)) * exact.abs().max().item()
    assert largest_difference(y, exact) <= tolerance


@each_narrow_dtype
@each_layout
def test_gradients_of_many_pixels(device, dtype, layout):
    """The sums over 2 x 64 x 64 pixels need more than 16 bits, whatever the layout."""
    tensors, _ = CASE.call(device, dtype, layout, shape=(2, 8, 64, 64))
    upstream = torch.linspace(0.5, 1, tensors["x"].numel(), device=device).view(tensors["x"].shape).to(dtype)

    def gradients(function, tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        return torch.autograd.grad(function(**leaves), list(leaves.values()), upstream.to(tensors["x"].dtype))

    exact = gradients(naive_layer_norm, cast(tensors, torch.float64))
    for name, actual, expected in zip(tensors, gradients(layer_norm, tensors), exact, strict=True):
        tolerance = max(2 * torch.finfo(dtype).eps, 1e-5) * expected.abs().max().item()
        assert largest_difference(actual, expected) <= tolerance, f"gradient of {name}"


@each_narrow_dtype
@each_layout
def test_flat_pixels_become_the_bias(device, dtype, layout):
    """No variance: eps keeps the quotient, and its gradient, finite."""
    tensors, _ = CASE.call(device, dtype, layout, spread=0, offset=0.5)
    x = tensors["x"].requires_grad_()
    y = layer_norm(**tensors)
    y.sum().backward()
    assert torch.equal(y, per_channel(tensors["bias"]).expand_as(y))
    assert x.grad.isfinite().all()

"""layer_norm: a building block that only the reference has."""

import pytest
import torch
from helpers.backends import Backend
from helpers.naive import naive_layer_norm, per_channel
from helpers.ops import (
    LAYOUTS,
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    largest_difference,
    random_parameters,
)

from seemore_fast.reference import layer_norm

REFERENCE = Backend("reference", "layer_norm")
each_memory_format = pytest.mark.parametrize("layout", [None, "channels_last"])


def tensors_of(device, shape=(2, 8, 6, 7)):
    return random_parameters({"x": shape, "weight": (shape[1],), "bias": (shape[1],)}, device)


@each_shape
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@each_memory_format
def test_values(device, shape, eps, layout):
    """The two layouts take different paths."""
    tensors = tensors_of(device, shape)
    assert_close_to_naive(REFERENCE, layer_norm, naive_layer_norm, tensors, layout, eps=eps)


@each_layout
def test_layouts(device, layout):
    assert_close_to_naive(REFERENCE, layer_norm, naive_layer_norm, tensors_of(device), layout)


@each_narrow_dtype
@each_memory_format
@pytest.mark.parametrize("spread, offset", [(1, 0), (300, 0), (1, 300), (1000, 1000)])
def test_narrow_dtypes(device, dtype, layout, spread, offset):
    """Squares beyond 256 overflow float16, their mean minus the squared mean cancels: neither may happen."""
    tensors = cast(tensors_of(device), dtype)
    tensors["x"] = LAYOUTS[layout](tensors["x"] * spread + offset) if layout else tensors["x"] * spread + offset
    exact = naive_layer_norm(**cast(tensors, torch.float64))
    y = layer_norm(**tensors)
    assert y.dtype == dtype
    # One rounding of the result, and float32's of numbers as large as the offset.
    tolerance = max(torch.finfo(dtype).eps, 5e-7 * (1 + offset / spread)) * exact.abs().max().item()
    assert largest_difference(y, exact) <= tolerance


@each_narrow_dtype
@each_memory_format
def test_gradients_of_many_pixels(device, dtype, layout):
    """The sums over 2 x 64 x 64 pixels need more than 16 bits, whatever the layout."""
    tensors = cast(tensors_of(device, (2, 8, 64, 64)), dtype)
    upstream = torch.linspace(0.5, 1, tensors["x"].numel(), device=device).view_as(tensors["x"]).to(dtype)

    def gradients(function, tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        return torch.autograd.grad(function(**leaves), list(leaves.values()), upstream.to(tensors["x"].dtype))

    exact = gradients(naive_layer_norm, cast(tensors, torch.float64))
    laid_out = {name: LAYOUTS[layout](tensor) for name, tensor in tensors.items()} if layout else tensors
    for name, actual, expected in zip(tensors, gradients(layer_norm, laid_out), exact, strict=True):
        tolerance = max(2 * torch.finfo(dtype).eps, 1e-5) * expected.abs().max().item()
        assert largest_difference(actual, expected) <= tolerance, f"gradient of {name}"


@each_narrow_dtype
@each_memory_format
def test_flat_pixels_become_the_bias(device, dtype, layout):
    """No variance: eps keeps the quotient, and its gradient, finite."""
    tensors = cast(tensors_of(device), dtype)
    x = torch.full_like(tensors["x"], 0.5)
    x = (LAYOUTS[layout](x) if layout else x).requires_grad_()
    y = layer_norm(x, tensors["weight"], tensors["bias"])
    y.sum().backward()
    assert torch.equal(y, per_channel(tensors["bias"]).expand_as(y))
    assert x.grad.isfinite().all()


@each_memory_format
def test_gradcheck(device, layout):
    tensors = tensors_of(device, (2, 3, 2, 3))
    if layout:
        tensors = {name: LAYOUTS[layout](tensor) for name, tensor in tensors.items()}
    assert_gradcheck(layer_norm, tensors)


def test_compiles(device):
    assert_compiles(layer_norm, tensors_of(device), tensors_of(device, (3, 8, 9, 5)))

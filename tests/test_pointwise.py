"""pointwise: 1x1 convolution, GELU, residual."""

import pytest
import torch
from helpers.backends import each_backend, running_on
from helpers.faults import assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_pointwise
from helpers.ops import (
    LAYOUTS,
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_within_yardstick,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    largest_difference,
    random_parameters,
)

from seemore_fast.ops import pointwise

each_option = pytest.mark.parametrize("residual", [False, True])
each_activation = pytest.mark.parametrize("activation", [None, "gelu"])


def tensors_of(device, shape=(2, 3, 6, 7), out=5, residual=True):
    shapes = {"x": shape, "weight": (out, shape[1], 1, 1), "bias": (out,)}
    return random_parameters(shapes | ({"residual": (shape[0], out, *shape[2:])} if residual else {}), device)


@each_backend("norm_pointwise")
@each_shape
@each_option
@each_activation
def test_values(backend, device, shape, residual, activation):
    tensors = tensors_of(device, shape, residual=residual)
    assert_close_to_naive(backend, pointwise, naive_pointwise, tensors, activation=activation)


@each_backend("norm_pointwise")
@each_layout
def test_layouts(backend, device, layout):
    assert_close_to_naive(backend, pointwise, naive_pointwise, tensors_of(device), layout)


@each_backend("norm_pointwise")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("shape, out", [((2, 36, 5, 9), 36), ((1, 5, 1, 70), 64), ((3, 17, 33, 1), 5)], ids=str)
def test_narrow_dtypes(backend, device, dtype, layout, shape, out):
    tensors = tensors_of(device, shape, out)
    assert_within_yardstick(backend, pointwise, naive_pointwise, tensors, dtype, layout)


@each_backend("norm_pointwise", dtype=torch.float64)
def test_gradcheck(backend, device):
    with running_on(backend, device):
        assert_gradcheck(pointwise, tensors_of(device, (2, 2, 3, 2)), activation="gelu")


@each_backend("norm_pointwise")
def test_compiles(backend, device):
    small, other = (cast(tensors_of(device, shape), backend.widest) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with running_on(backend, device):
        assert_compiles(pointwise, small, other)


@each_backend("norm_pointwise")
def test_under_autocast(backend, device):
    """The convolution is rounded to bfloat16, the residual stays float32 and so does the sum."""
    tensors = cast(tensors_of(device, (2, 5, 6, 7)), torch.float32)
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        y = pointwise(**tensors)
    exact = naive_pointwise(**cast(tensors, torch.float64))
    assert y.dtype == torch.float32
    assert 0 < largest_difference(y, exact) < 2**-6 * exact.abs().max()


@each_fault
def test_bad_tensors(device, fault):
    exempt = ["residual"] if fault == "none" else []
    assert_refused(fault, pointwise, tensors_of(device), exempt)


def test_bad_sizes(device):
    assert_sizes_refused(pointwise, tensors_of(device))


@pytest.mark.parametrize("activation", ["relu", "GELU", "", False])
def test_unknown_activations_are_refused(device, activation):
    with pytest.raises(ValueError, match=r"^pointwise: activation is .*, expected one of None, 'gelu'"):
        pointwise(**tensors_of(device), activation=activation)

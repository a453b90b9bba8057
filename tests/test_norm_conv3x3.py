"""norm_conv3x3: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import naive_norm_conv3x3
from helpers.ops import assert_values, cast, largest_difference, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast.ops import norm_conv3x3

CASE = BY_NAME["norm_conv3x3"]


@each_backend("norm_conv3x3")
def test_border_sees_zeros_after_the_norm(backend, device):
    """LN of one channel is its bias, 1: a sum over 3x3 of it counts the taps inside of the image."""
    one = torch.ones(1, dtype=backend.widest, device=device)
    x, weight = one.expand(1, 1, 3, 3), one.expand(1, 1, 3, 3)
    with running_on(backend, device):
        y = norm_conv3x3(x, one, one, weight, 0 * one)
    assert y.tolist() == [[[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]]


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 1, 3, 4), (2, 4, 1, 5), (2, 4, 5, 1), (1, 1, 1, 1)], ids=str)
def test_packed_images_are_read_where_they_are(backend, device, shape):
    """Strides of sizes of 1 do not matter, but those of others do: a slice of a packed image has gaps."""
    from seemore_fast.backends.planes import new_packed
    from seemore_fast.kernels.windows import is_packed

    larger = new_packed(torch.empty(shape), shape[1] + 1)
    assert is_packed(larger) and is_packed(larger[::2]) and is_packed(larger[:, :, :1])
    assert is_packed(larger[:, 1:]) == (shape[2:] == (1, 1))
    assert is_packed(torch.empty(shape)) == (shape[1] == 1 or shape[2:] == (1, 1))
    assert_values(backend, CASE, *CASE.call(device, torch.float32, "channels_last", shape=shape, norm=False))


@each_kernel("norm_conv3x3")
def test_autocast_rounds_what_is_normalised(backend, device):
    """x is normalised in float32; without a norm it is rounded itself."""
    given = dict(shape=(2, 36, 6, 7), pointwise=False, activation=None, offset=1000)
    tensors, options = CASE.call(device, torch.float32, **given)
    exact = naive_norm_conv3x3(**cast(tensors, torch.float64), **options)
    plain, without = CASE.call(device, torch.float32, norm=False, **given)
    with running_on(backend, device):
        narrow = norm_conv3x3(**cast(plain, torch.bfloat16), **without)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = value_and_gradients(norm_conv3x3, tensors, **options)
            assert torch.equal(norm_conv3x3(**plain, **without), narrow)
    assert found["y"].dtype == torch.bfloat16
    assert found["gradient of x"].dtype == found["gradient of weight"].dtype == torch.float32
    assert largest_difference(found["y"], exact) < 2**-6 * exact.abs().max()

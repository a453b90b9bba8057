"""striped_conv_router: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.ops import assert_values
from helpers.table import BY_NAME, CPU_TILES

from seemore_fast import reference
from seemore_fast.ops import router, striped_conv_router

CASE = BY_NAME["striped_conv_router"]


@each_kernel("striped_conv")
@pytest.mark.parametrize("shape, taps", [((1, 3, 5, 4), 5), ((0, 3, 4, 5), 3)], ids=str)
def test_kernels_of_the_parts_take_other_taps_and_no_images(backend, device, shape, taps):
    assert_values(backend, CASE, *CASE.call(device, torch.float32, shape=shape, taps=taps, activation="gelu"))


@each_kernel("striped_conv_router")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 41, 130), (3, 4, 23, 64)], ids=str)
def test_the_pool_is_that_of_the_rounded_image(backend, device, shape, dtype):
    tensors, options = CASE.call(device, dtype, shape=shape, top_k=3, activation="gelu")
    with running_on(backend, device):
        y, index, weight = striped_conv_router(**tensors, **options)
    expected = reference.router(y, tensors["weight_router"], 3)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1], rtol=1e-5, atol=1e-6)


@each_kernel("striped_conv_router", interpreted=False)
@pytest.mark.parametrize("shape, layout", CPU_TILES, ids=str)
def test_tiles_of_the_cpu(backend, device, shape, layout):
    """The pool's sums have more than one part.

    The gradients of these long images nearly cancel: in float32 the reference itself errs by 300 eps of the largest,
    where its error as a measure ends at 64. Those of their tiles are tested as striped_conv's.
    """
    tensors, options = CASE.call(device, torch.float32, layout, shape=shape)
    with running_on(backend, device):
        y, index, weight = striped_conv_router(**tensors, **options)
    expected = reference.router(y, tensors["weight_router"], 2)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1])


@each_backend("striped_conv_router")
def test_autocast(backend, device):
    """The convolution is cast; the router stays float32."""
    tensors, _ = CASE.call(device, torch.float32)
    with running_on(backend, device), torch.autocast(device, torch.bfloat16):
        y, index, weight = striped_conv_router(**tensors, top_k=2)
        expected = router(y, tensors["weight_router"], 2)
    assert [result.dtype for result in (y, index, weight)] == [torch.bfloat16, torch.int64, torch.float32]
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1])

"""striped_conv_router: a striped convolution, and the router of its result, pooled while it is made."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_expert_weight, naive_striped_conv
from helpers.ops import (
    LAYOUTS,
    assert_compiles,
    assert_deterministic,
    assert_opcheck,
    assert_writes_its_results_only,
    cast,
    each_layout,
    random_parameters,
    striped_shapes,
    value_and_gradients,
)

from seemore_fast import reference
from seemore_fast.ops import router, striped_conv_router


def tensors_of(device, shape=(2, 3, 6, 7), taps=3, experts=3):
    shapes = {"x": shape, **striped_shapes(shape[1], taps), "weight_router": (experts, shape[1])}
    tensors = random_parameters(shapes, device)
    tensors["weight_router"] *= 5  # the images' means are near each other
    return tensors


def joined(operator):
    """Return the operator with one result that holds y and the experts' weights, of which gradients are taken."""

    def function(x, weight_row, bias_row, weight_col, bias_col, weight_router, top_k=2, activation="gelu"):
        convolution = x, weight_row, bias_row, weight_col, bias_col
        y, _, weight = operator(*convolution, weight_router, top_k, activation=activation)
        return torch.cat([y.flatten().to(weight.dtype), weight.flatten() * 8])[None]

    function.__name__ = operator.__name__
    return function


def naive(x, weight_row, bias_row, weight_col, bias_col, weight_router, top_k, activation):
    y = naive_striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation)
    index = reference.router(y.detach(), weight_router.detach(), top_k)[0]
    return y, index, naive_expert_weight(y, weight_router, index)


def assert_close_to_naive(backend, device, shape, taps):
    tensors = cast(tensors_of(device, shape, taps), torch.float32)
    wide = cast(tensors, torch.float64)
    expected = value_and_gradients(joined(naive), wide)
    with running_on(backend, device):
        actual = value_and_gradients(joined(striped_conv_router), tensors)
        index = striped_conv_router(**tensors, top_k=2, activation="gelu")[1]
    assert torch.equal(index, naive(**wide, top_k=2, activation="gelu")[1])
    for what, value in expected.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(
            actual[what].double(), value, rtol=1e-4, atol=2e-5 * largest, msg=lambda t, what=what: f"{what}: {t}"
        )


@each_backend("striped_conv_router", interpreted=False)
@pytest.mark.parametrize(
    "shape, taps", [((2, 3, 6, 7), 3), ((2, 5, 41, 130), 3), ((1, 2, 90, 260), 11), ((3, 4, 23, 64), 7)], ids=str
)
def test_values_and_gradients(backend, device, shape, taps):
    assert_close_to_naive(backend, device, shape, taps)


@each_kernel("striped_conv")
def test_other_taps_are_left_to_the_kernels_of_the_parts(backend, device):
    assert_close_to_naive(backend, device, (1, 3, 5, 4), 5)


@each_kernel("striped_conv_router")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 41, 130), (3, 4, 23, 64)], ids=str)
def test_the_pool_is_that_of_the_rounded_image(backend, device, shape, dtype):
    tensors = cast(tensors_of(device, shape), dtype)
    with running_on(backend, device):
        y, index, weight = striped_conv_router(**tensors, top_k=3, activation="gelu")
    expected = reference.router(y, tensors["weight_router"], 3)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1], rtol=1e-5, atol=1e-6)


@each_kernel("striped_conv_router")
@each_layout
def test_layouts(backend, device, layout):
    tensors = cast(tensors_of(device, (2, 3, 9, 13)), torch.float32)
    with running_on(backend, device):
        expected = striped_conv_router(**tensors, top_k=2)
        found = striped_conv_router(**{name: LAYOUTS[layout](t) for name, t in tensors.items()}, top_k=2)
    for result, value in zip(found, expected, strict=True):
        torch.testing.assert_close(result, value)


@each_backend("striped_conv_router")
def test_compiles(backend, device):
    tensors, others = (cast(tensors_of(device, shape), torch.float32) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with running_on(backend, device):
        assert_compiles(joined(striped_conv_router), tensors, others)


@each_kernel("striped_conv_router")
def test_opcheck(backend, device):
    with running_on(backend, device):
        assert_opcheck(striped_conv_router, cast(tensors_of(device), torch.float32), top_k=2, activation="gelu")


@each_kernel("striped_conv_router")
def test_writes_its_results_only(backend, device):
    with running_on(backend, device):
        tensors = cast(tensors_of(device, (2, 3, 13, 19)), torch.float32)
        assert_writes_its_results_only(joined(striped_conv_router), tensors)


@each_kernel("striped_conv_router")
def test_deterministic(backend, device):
    with running_on(backend, device):
        tensors = cast(tensors_of(device, (2, 3, 70, 40)), torch.float32)
        assert_deterministic(joined(striped_conv_router), tensors)


@each_kernel("striped_conv_router", interpreted=False)
@pytest.mark.parametrize("width", [19, 64])
def test_images_are_alone(backend, device, width):
    tensors = cast(tensors_of(device, (3, 2, 9, width)), torch.float32)
    with running_on(backend, device):
        expected = striped_conv_router(**tensors, top_k=2)
        tensors["x"][0] = torch.nan
        found = striped_conv_router(**tensors, top_k=2)
    assert all(torch.equal(result[1:], value[1:]) for result, value in zip(found, expected, strict=True))


@each_kernel("striped_conv_router", interpreted=False)
@pytest.mark.parametrize(
    "shape, layout", [((2, 1, 530, 3), None), ((1, 1, 2, 1060), None), ((1, 70, 3, 150), "channels_last")], ids=str
)
def test_tiles_of_the_cpu(backend, device, shape, layout):
    """Sums of more than one part."""
    tensors = cast(tensors_of(device, shape), torch.float32)
    tensors["x"] = LAYOUTS[layout](tensors["x"]) if layout else tensors["x"]
    with running_on(backend, device):
        y, index, weight = striped_conv_router(**tensors, top_k=2)
    expected = reference.router(y, tensors["weight_router"], 2)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1])


@each_backend("striped_conv")
def test_no_images(backend, device):
    """They are left to the kernels of the parts."""
    with running_on(backend, device):
        results = striped_conv_router(**cast(tensors_of(device, (0, 3, 4, 5)), torch.float32), top_k=2)
    assert [tuple(result.shape) for result in results] == [(0, 3, 4, 5), (0, 2), (0, 2)]


@each_backend("striped_conv_router")
def test_autocast(backend, device):
    """The convolution is cast; the router stays float32."""
    tensors = cast(tensors_of(device), torch.float32)
    with running_on(backend, device), torch.autocast(device, torch.bfloat16):
        y, index, weight = striped_conv_router(**tensors, top_k=2)
        expected = router(y, tensors["weight_router"], 2)
    assert [result.dtype for result in (y, index, weight)] == [torch.bfloat16, torch.int64, torch.float32]
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1])


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, striped_conv_router, tensors_of(device), top_k=1)


def test_bad_sizes(device):
    free = [*BATCH_AND_PIXELS, ("weight_router", 0)]
    assert_sizes_refused(striped_conv_router, tensors_of(device), free, top_k=1)


@pytest.mark.parametrize("wrong, message", [({"top_k": 4}, "top_k is 4"), ({"activation": "relu"}, "activation is")])
def test_bad_options(device, wrong, message):
    with pytest.raises(ValueError, match=f"^striped_conv_router: {message}"):
        striped_conv_router(**tensors_of(device), **{"top_k": 1, **wrong})

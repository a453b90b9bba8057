"""conv3x3_shuffle: dense 3x3 convolution, pixel shuffle, range and mean."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, FAULTS, assert_refused, assert_sizes_refused
from helpers.naive import naive_conv3x3_shuffle
from helpers.ops import (
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_large_offsets,
    assert_operator,
    assert_within_yardstick,
    cast,
    each_layout,
    largest_difference,
    random_parameters,
    value_and_gradients,
)

from seemore_fast import reference
from seemore_fast.ops import conv3x3_shuffle

each_size = pytest.mark.parametrize(
    "shape, picture, scale",
    [((2, 3, 6, 7), 1, 2), ((1, 5, 1, 9), 3, 1), ((2, 7, 5, 1), 2, 3), ((1, 1, 1, 1), 1, 5)],
    ids=str,
)


def tensors_of(device, shape=(2, 3, 6, 7), picture=3, scale=2):
    made = picture * scale**2
    shapes = {"x": shape, "weight": (made, shape[1], 3, 3), "bias": (made,), "mean": (1, picture, 1, 1)}
    return random_parameters(shapes, device)


@each_backend("conv3x3_shuffle")
@each_size
def test_values(backend, device, shape, picture, scale):
    tensors = tensors_of(device, shape, picture, scale)
    assert_close_to_naive(backend, conv3x3_shuffle, naive_conv3x3_shuffle, tensors, scale=scale, img_range=2.5)


@each_backend("conv3x3_shuffle")
@each_layout
def test_layouts(backend, device, layout):
    assert_close_to_naive(backend, conv3x3_shuffle, naive_conv3x3_shuffle, tensors_of(device), layout, scale=2)


@each_backend("conv3x3_shuffle")
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_is_wide(backend, device, given):
    """Nothing is rounded to a narrow dtype, of x or of the parameters, autocast or not; gradients are as their own."""
    tensors = cast(tensors_of(device, (1, 12, 5, 6), 3, 2), given)
    exact = naive_conv3x3_shuffle(**cast(tensors, torch.float64), scale=2)
    mixed = tensors | {"x": tensors["x"].float(), "bias": tensors["bias"].double()}
    with running_on(backend, device):
        found = [value_and_gradients(conv3x3_shuffle, inputs, scale=2) for inputs in (tensors, mixed)]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found.append(value_and_gradients(conv3x3_shuffle, tensors, scale=2))
    for values, inputs in zip(found, (tensors, mixed, tensors), strict=True):
        assert values["y"].dtype == torch.float32
        assert largest_difference(values["y"], exact) < 4e-6 * exact.abs().max()
        assert all(values[f"gradient of {name}"].dtype == tensor.dtype for name, tensor in inputs.items())


@each_backend("conv3x3_shuffle", dtype=torch.float64)
def test_gradcheck(backend, device):
    with running_on(backend, device):
        assert_gradcheck(conv3x3_shuffle, tensors_of(device, (2, 2, 3, 2), 1), scale=2, img_range=3.0)


@each_backend("conv3x3_shuffle", dtype=torch.float64)
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(conv3x3_shuffle, tensors_of(device), tensors_of(device, (3, 3, 9, 5)), scale=2)


def test_as_the_model_ends(device, small_model):
    """With the model's own parameters, what its last lines give."""
    conv = small_model.upsampler[0]
    x = torch.randn(1, conv.in_channels, 9, 8, device=device)
    expected = small_model.upsampler(x) / small_model.img_range + small_model.mean
    y = conv3x3_shuffle(x, conv.weight, conv.bias, small_model.mean, scale=small_model.scale)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "dtype"])
def test_bad_tensors(device, fault):
    assert_refused(fault, conv3x3_shuffle, tensors_of(device), scale=2)


def test_bad_sizes(device):
    assert_sizes_refused(conv3x3_shuffle, tensors_of(device), free=BATCH_AND_PIXELS, scale=2)


@pytest.mark.parametrize("options", [{"scale": 0}, {"scale": 2.0}, {"scale": 3}, {"scale": 2, "img_range": 0}], ids=str)
def test_bad_options(device, options):
    with pytest.raises(ValueError, match=r"^conv3x3_shuffle: (scale|img_range|weight) .*, expected"):
        conv3x3_shuffle(**tensors_of(device), **options)


# Kernels, which float32 has


def float_tensors(device, *size, dtype=torch.float32):
    return cast(tensors_of(device, *size), dtype)


@each_kernel("conv3x3_shuffle")
@pytest.mark.parametrize(
    "shape, picture, scale",
    [((1, 36, 5, 17), 3, 4), ((2, 5, 3, 7), 3, 3), ((1, 48, 4, 3), 1, 7), ((2, 3, 1, 5), 4, 2), ((1, 1, 9, 1), 1, 1)],
    ids=str,
)
def test_sizes(backend, device, shape, picture, scale):
    tensors = tensors_of(device, shape, picture, scale)
    options = {"scale": scale, "img_range": 255.0}
    assert_within_yardstick(backend, conv3x3_shuffle, naive_conv3x3_shuffle, tensors, torch.float32, **options)


@each_kernel("conv3x3_shuffle")
@pytest.mark.falls_back("triton", reason="up to 64 channels, of the result, too")
def test_wide_models_are_left_to_the_reference(backend, device):
    tensors = float_tensors(device, (1, 3, 2, 3), 3, 5)
    with running_on(backend, device):
        assert torch.equal(conv3x3_shuffle(**tensors, scale=5), reference.conv3x3_shuffle(**tensors, scale=5))


@each_kernel("conv3x3_shuffle")
def test_no_images(backend, device):
    with running_on(backend, device):
        found = value_and_gradients(conv3x3_shuffle, float_tensors(device, (0, 3, 4, 5)), scale=2)
    assert found["y"].shape == (0, 3, 8, 10)
    assert not any(found[f"gradient of {name}"].any() for name in ("weight", "bias", "mean"))


@each_kernel("conv3x3_shuffle")
def test_operator(backend, device):
    tensors = float_tensors(device)
    with running_on(backend, device):
        assert_operator(conv3x3_shuffle, tensors, {"img_range": 1.0}, scale=2)
        assert_compiles(conv3x3_shuffle, tensors, float_tensors(device, (3, 3, 9, 5)), scale=2)


@each_kernel("conv3x3_shuffle")
def test_offsets_beyond_31_bits(backend, device):
    with running_on(backend, device):
        assert_large_offsets(conv3x3_shuffle, float_tensors(device), ["x"], scale=2)

"""conv3x3_shuffle: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import naive_conv3x3_shuffle
from helpers.ops import cast, largest_difference, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast.ops import conv3x3_shuffle


@each_backend("conv3x3_shuffle")
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_is_wide(backend, device, given):
    """Nothing is rounded to a narrow dtype, of x or of the parameters, autocast or not; gradients are as their own."""
    tensors, options = BY_NAME["conv3x3_shuffle"].call(device, given, shape=(1, 12, 5, 6))
    exact = naive_conv3x3_shuffle(**cast(tensors, torch.float64), **options)
    mixed = tensors | {"x": tensors["x"].float(), "bias": tensors["bias"].double()}
    with running_on(backend, device):
        found = [value_and_gradients(conv3x3_shuffle, inputs, **options) for inputs in (tensors, mixed)]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found.append(value_and_gradients(conv3x3_shuffle, tensors, **options))
    for values, inputs in zip(found, (tensors, mixed, tensors), strict=True):
        assert values["y"].dtype == torch.float32
        assert largest_difference(values["y"], exact) < 4e-6 * exact.abs().max()
        assert all(values[f"gradient of {name}"].dtype == tensor.dtype for name, tensor in inputs.items())


@each_kernel("conv3x3_shuffle")
def test_no_images(backend, device):
    """PyTorch's own pixel shuffle has no gradient of them."""
    tensors, options = BY_NAME["conv3x3_shuffle"].call(device, torch.float32, shape=(0, 3, 4, 5))
    with running_on(backend, device):
        found = value_and_gradients(conv3x3_shuffle, tensors, **options)
    assert found["y"].shape == (0, 3, 8, 10)
    assert not any(found[f"gradient of {name}"].any() for name in ("weight", "bias", "mean"))


def test_as_the_model_ends(device, small_model):
    """With the model's own parameters, what its last lines give."""
    conv = small_model.upsampler[0]
    x = torch.randn(1, conv.in_channels, 9, 8, device=device)
    expected = small_model.upsampler(x) / small_model.img_range + small_model.mean
    y = conv3x3_shuffle(x, conv.weight, conv.bias, small_model.mean, scale=small_model.scale)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)

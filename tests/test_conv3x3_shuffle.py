"""conv3x3_shuffle: dense 3x3 convolution, pixel shuffle, range and mean."""

import kit
import pytest
import torch

from seemore_fast import reference
from seemore_fast.ops import conv3x3_shuffle

each_size = pytest.mark.parametrize(
    "shape, picture, scale",
    [((2, 3, 6, 7), 1, 2), ((1, 5, 1, 9), 3, 1), ((2, 7, 5, 1), 2, 3), ((1, 1, 1, 1), 1, 5)],
    ids=str,
)


def naive_conv3x3_shuffle(x, weight, bias, mean, scale, img_range=1.0):
    y = kit.naive_dense(x, weight, bias)
    batch, channels, height, width = y.shape
    picture = channels // scale**2
    y = y.reshape(batch, picture, scale, scale, height, width)
    rows = [torch.stack([y[:, :, i, j] for j in range(scale)], dim=-1).flatten(-2) for i in range(scale)]
    return torch.stack(rows, dim=-2).flatten(2, 3) / img_range + mean


def tensors_of(device, shape=(2, 3, 6, 7), picture=3, scale=2):
    made = picture * scale**2
    shapes = {"x": shape, "weight": (made, shape[1], 3, 3), "bias": (made,), "mean": (1, picture, 1, 1)}
    return kit.random_parameters(shapes, device)


@kit.each_backend("conv3x3_shuffle")
@each_size
def test_values(backend, device, shape, picture, scale):
    tensors = tensors_of(device, shape, picture, scale)
    kit.assert_close_to_naive(backend, conv3x3_shuffle, naive_conv3x3_shuffle, tensors, scale=scale, img_range=2.5)


@kit.each_backend("conv3x3_shuffle")
@kit.each_layout
def test_layouts(backend, device, layout):
    kit.assert_close_to_naive(backend, conv3x3_shuffle, naive_conv3x3_shuffle, tensors_of(device), layout, scale=2)


@kit.each_backend("conv3x3_shuffle")
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_is_wide(backend, device, given):
    """Nothing is rounded to a narrow dtype, of x or of the parameters, autocast or not; gradients are as their own."""
    tensors = kit.cast(tensors_of(device, (1, 12, 5, 6), 3, 2), given)
    exact = naive_conv3x3_shuffle(**kit.cast(tensors, torch.float64), scale=2)
    mixed = tensors | {"x": tensors["x"].float(), "bias": tensors["bias"].double()}
    with kit.chosen(backend, device):
        found = [kit.value_and_gradients(conv3x3_shuffle, inputs, scale=2) for inputs in (tensors, mixed)]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found.append(kit.value_and_gradients(conv3x3_shuffle, tensors, scale=2))
    for values, inputs in zip(found, (tensors, mixed, tensors), strict=True):
        assert values["y"].dtype == torch.float32
        assert kit.largest_difference(values["y"], exact) < 4e-6 * exact.abs().max()
        assert all(values[f"gradient of {name}"].dtype == tensor.dtype for name, tensor in inputs.items())


@kit.each_backend("conv3x3_shuffle", dtype=torch.float64)
def test_gradcheck(backend, device):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(conv3x3_shuffle, tensors_of(device, (2, 2, 3, 2), 1), scale=2, img_range=3.0)


@kit.each_backend("conv3x3_shuffle", dtype=torch.float64)
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(conv3x3_shuffle, tensors_of(device), tensors_of(device, (3, 3, 9, 5)), scale=2)


def test_as_the_model_ends(device, small_model):
    """With the model's own parameters, what its last lines give."""
    conv = small_model.upsampler[0]
    x = torch.randn(1, conv.in_channels, 9, 8, device=device)
    expected = small_model.upsampler(x) / small_model.img_range + small_model.mean
    y = conv3x3_shuffle(x, conv.weight, conv.bias, small_model.mean, scale=small_model.scale)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", [fault for fault in kit.FAULTS if fault != "dtype"])
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, conv3x3_shuffle, tensors_of(device), scale=2)


def test_bad_sizes(device):
    kit.assert_sizes_refused(conv3x3_shuffle, tensors_of(device), free=kit.BATCH_AND_PIXELS, scale=2)


@pytest.mark.parametrize("options", [{"scale": 0}, {"scale": 2.0}, {"scale": 3}, {"scale": 2, "img_range": 0}], ids=str)
def test_bad_options(device, options):
    with pytest.raises(ValueError, match=r"^conv3x3_shuffle: (scale|img_range|weight) .*, expected"):
        conv3x3_shuffle(**tensors_of(device), **options)


# Kernels, which float32 has


def float_tensors(device, *size, dtype=torch.float32):
    return kit.cast(tensors_of(device, *size), dtype)


@kit.each_kernel("conv3x3_shuffle")
@pytest.mark.parametrize(
    "shape, picture, scale",
    [((1, 36, 5, 17), 3, 4), ((2, 5, 3, 7), 3, 3), ((1, 48, 4, 3), 1, 7), ((2, 3, 1, 5), 4, 2), ((1, 1, 9, 1), 1, 1)],
    ids=str,
)
def test_sizes(backend, device, shape, picture, scale):
    tensors = tensors_of(device, shape, picture, scale)
    options = {"scale": scale, "img_range": 255.0}
    kit.assert_within_yardstick(backend, conv3x3_shuffle, naive_conv3x3_shuffle, tensors, torch.float32, **options)


@kit.each_kernel("conv3x3_shuffle")
@pytest.mark.falls_back("triton", reason="up to 64 channels, of the result, too")
def test_wide_models_are_left_to_the_reference(backend, device):
    tensors = float_tensors(device, (1, 3, 2, 3), 3, 5)
    with kit.chosen(backend, device):
        assert torch.equal(conv3x3_shuffle(**tensors, scale=5), reference.conv3x3_shuffle(**tensors, scale=5))


@kit.each_kernel("conv3x3_shuffle")
def test_no_images(backend, device):
    with kit.chosen(backend, device):
        found = kit.value_and_gradients(conv3x3_shuffle, float_tensors(device, (0, 3, 4, 5)), scale=2)
    assert found["y"].shape == (0, 3, 8, 10)
    assert not any(found[f"gradient of {name}"].any() for name in ("weight", "bias", "mean"))


@kit.each_kernel("conv3x3_shuffle")
def test_operator(backend, device):
    tensors = float_tensors(device)
    with kit.chosen(backend, device):
        kit.assert_operator(conv3x3_shuffle, tensors, {"img_range": 1.0}, scale=2)
        kit.assert_compiles(conv3x3_shuffle, tensors, float_tensors(device, (3, 3, 9, 5)), scale=2)


@kit.each_kernel("conv3x3_shuffle")
def test_offsets_beyond_31_bits(backend, device):
    with kit.chosen(backend, device):
        kit.assert_large_offsets(conv3x3_shuffle, float_tensors(device), ["x"], scale=2)

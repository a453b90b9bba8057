"""norm_pointwise: LayerNorm, 1x1 convolution, GELU."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_norm_pointwise
from helpers.ops import (
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_large_offsets,
    assert_operator,
    assert_within_yardstick,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    largest_difference,
    norm_shapes,
    random_parameters,
    value_and_gradients,
)

from seemore_fast.ops import norm_pointwise

each_activation = pytest.mark.parametrize("activation", [None, "gelu"])


def tensors_of(device, shape=(2, 3, 6, 7), out=5):
    pointwise = {"weight": (out, shape[1], 1, 1), "bias": (out,)}
    return random_parameters({"x": shape} | norm_shapes(shape[1]) | pointwise, device)


@each_backend("norm_pointwise")
@each_shape
@each_activation
def test_values(backend, device, shape, activation):
    tensors = tensors_of(device, shape, out=2 * shape[1])
    assert_close_to_naive(backend, norm_pointwise, naive_norm_pointwise, tensors, activation=activation)


@each_backend("norm_pointwise")
@pytest.mark.parametrize("out", [1, 3, 40])
def test_numbers_of_output_channels(backend, device, out):
    tensors = tensors_of(device, out=out)
    assert_close_to_naive(backend, norm_pointwise, naive_norm_pointwise, tensors, activation="gelu")


@each_backend("norm_pointwise")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(backend, device, eps):
    assert_close_to_naive(backend, norm_pointwise, naive_norm_pointwise, tensors_of(device), eps=eps)


@each_backend("norm_pointwise")
@each_layout
@each_activation
def test_layouts(backend, device, layout, activation):
    assert_close_to_naive(
        backend, norm_pointwise, naive_norm_pointwise, tensors_of(device), layout, activation=activation
    )


@each_backend("norm_pointwise")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors = tensors_of(device, (2, 8, 17, 19), out=16)
    tensors["x"] *= spread
    assert_within_yardstick(backend, norm_pointwise, naive_norm_pointwise, tensors, dtype, layout, activation="gelu")


@each_backend("norm_pointwise", dtype=torch.float64)
@each_activation
def test_gradcheck(backend, device, activation):
    with running_on(backend, device):
        assert_gradcheck(norm_pointwise, tensors_of(device, (2, 3, 2, 3)), activation=activation)


@each_backend("norm_pointwise", dtype=torch.float64)
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(norm_pointwise, tensors_of(device), tensors_of(device, (3, 3, 9, 5)), activation="gelu")


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, norm_pointwise, tensors_of(device))


def test_bad_sizes(device):
    assert_sizes_refused(norm_pointwise, tensors_of(device), free=BATCH_AND_PIXELS)


@pytest.mark.parametrize("activation", ["relu", "GELU", "", False])
def test_unknown_activations_are_refused(device, activation):
    with pytest.raises(ValueError, match=r"^norm_pointwise: activation is .*, expected one of None, 'gelu'"):
        norm_pointwise(**tensors_of(device), activation=activation)


# Kernels, which float32, float16 and bfloat16 have


def float_tensors(device, shape=(2, 3, 6, 7), out=5, dtype=torch.float32):
    return cast(tensors_of(device, shape, out), dtype)


@each_kernel("norm_pointwise")
@pytest.mark.parametrize(
    "shape, out",
    [
        ((1, 36, 7, 41), 72),  # more than one tile of pixels
        ((1, 48, 3, 9), 96),
        ((1, 64, 6, 5), 128),
        ((2, 36, 4, 4), 36),
        ((3, 1, 1, 1), 1),
        ((2, 17, 1, 33), 3),
        ((1, 5, 70, 1), 31),
    ],
    ids=str,
)
def test_sizes(backend, device, shape, out):
    tensors = tensors_of(device, shape, out)
    options = {"activation": "gelu" if out % 4 == 0 else None}
    for dtype in (torch.float32,) if shape[1] > 36 else (torch.float32, torch.bfloat16):
        assert_within_yardstick(backend, norm_pointwise, naive_norm_pointwise, tensors, dtype, **options)


@each_kernel("norm_pointwise", dtype=torch.float64)
@each_layout
def test_strides(backend, device, layout):
    """In float32, where test_layouts is in float64."""
    tensors = tensors_of(device, (2, 5, 6, 7), 9)
    assert_within_yardstick(
        backend, norm_pointwise, naive_norm_pointwise, tensors, torch.float32, layout, activation="gelu"
    )


@each_kernel("norm_pointwise")
def test_large_offset_of_the_mean(backend, device):
    """The mean is subtracted before anything is squared or rounded."""
    tensors = tensors_of(device, (1, 36, 5, 6), 8)
    tensors["x"] += 1000
    assert_within_yardstick(backend, norm_pointwise, naive_norm_pointwise, tensors, torch.float32)


@each_kernel("norm_pointwise")
def test_programs_of_more_than_one_tile_add_up(backend, device, monkeypatch):
    products = pytest.importorskip("seemore_fast.kernels.products")
    monkeypatch.setattr(products, "PARTS", 2)
    tensors = tensors_of(device, (1, 5, 20, 19), 7)
    assert_within_yardstick(backend, norm_pointwise, naive_norm_pointwise, tensors, torch.float32, activation="gelu")


@each_kernel("norm_pointwise")
def test_no_images(backend, device):
    with running_on(backend, device):
        found = value_and_gradients(norm_pointwise, float_tensors(device, (0, 3, 4, 5)), activation="gelu")
    assert found["y"].shape == (0, 5, 4, 5)
    assert not any(found[f"gradient of {name}"].any() for name in ("norm_weight", "norm_bias", "weight", "bias"))


@each_kernel("norm_pointwise")
@pytest.mark.falls_back("triton", reason="up to 64 channels")
def test_wide_models_are_left_to_the_reference(backend, device):
    tensors = tensors_of(device, (1, 65, 2, 3), 8)
    assert_within_yardstick(backend, norm_pointwise, naive_norm_pointwise, tensors, torch.float32)


@each_kernel("norm_pointwise")
def test_operator(backend, device):
    tensors = float_tensors(device)
    with running_on(backend, device):
        assert_operator(norm_pointwise, tensors, {"eps": 1e-6}, activation="gelu")
        assert_compiles(norm_pointwise, tensors, float_tensors(device, (3, 3, 9, 5)), activation="gelu")


@each_kernel("norm_pointwise")
def test_offsets_beyond_31_bits(backend, device):
    with running_on(backend, device):
        assert_large_offsets(norm_pointwise, float_tensors(device, dtype=torch.bfloat16), ["x"], activation="gelu")


@each_kernel("norm_pointwise")
def test_under_autocast(backend, device):
    """x is normalised in float32 and only then rounded: a mean that dwarfs the deviations does no harm."""
    tensors = float_tensors(device, (2, 36, 6, 7), 8)
    tensors["x"] += 1000
    exact = naive_norm_pointwise(**cast(tensors, torch.float64))
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        found = value_and_gradients(norm_pointwise, tensors)
    assert found["y"].dtype == torch.bfloat16
    assert found["gradient of x"].dtype == found["gradient of weight"].dtype == torch.float32
    assert largest_difference(found["y"], exact) < 2**-6 * exact.abs().max()

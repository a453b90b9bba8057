"""norm_pointwise: LayerNorm, 1x1 convolution, GELU."""

import kit
import pytest

from seemore_fast.ops import norm_pointwise

each_activation = pytest.mark.parametrize("activation", [None, "gelu"])


def naive_norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation=None, eps=1e-6):
    y = kit.naive_pointwise(kit.naive_layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return kit.naive_activation(y, activation)


def tensors_of(device, shape=(2, 3, 6, 7), out=5):
    pointwise = {"weight": (out, shape[1], 1, 1), "bias": (out,)}
    return kit.random_parameters({"x": shape} | kit.norm_shapes(shape[1]) | pointwise, device)


@kit.each_backend("norm_pointwise")
@kit.each_shape
@each_activation
def test_values(backend, device, shape, activation):
    tensors = tensors_of(device, shape, out=2 * shape[1])
    kit.assert_close_to_naive(backend, norm_pointwise, naive_norm_pointwise, tensors, activation=activation)


@kit.each_backend("norm_pointwise")
@pytest.mark.parametrize("out", [1, 3, 40])
def test_numbers_of_output_channels(backend, device, out):
    tensors = tensors_of(device, out=out)
    kit.assert_close_to_naive(backend, norm_pointwise, naive_norm_pointwise, tensors, activation="gelu")


@kit.each_backend("norm_pointwise")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(backend, device, eps):
    kit.assert_close_to_naive(backend, norm_pointwise, naive_norm_pointwise, tensors_of(device), eps=eps)


@kit.each_backend("norm_pointwise")
@kit.each_layout
@each_activation
def test_layouts(backend, device, layout, activation):
    kit.assert_close_to_naive(
        backend, norm_pointwise, naive_norm_pointwise, tensors_of(device), layout, activation=activation
    )


@kit.each_backend("norm_pointwise")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors = tensors_of(device, (2, 8, 17, 19), out=16)
    tensors["x"] *= spread
    kit.assert_within_yardstick(
        backend, norm_pointwise, naive_norm_pointwise, tensors, dtype, layout, activation="gelu"
    )


@kit.each_backend("norm_pointwise")
@each_activation
def test_gradcheck(backend, device, activation):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(norm_pointwise, tensors_of(device, (2, 3, 2, 3)), activation=activation)


@kit.each_backend("norm_pointwise")
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(norm_pointwise, tensors_of(device), tensors_of(device, (3, 3, 9, 5)), activation="gelu")


@kit.each_fault
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, norm_pointwise, tensors_of(device))


def test_bad_sizes(device):
    kit.assert_sizes_refused(norm_pointwise, tensors_of(device), free=kit.BATCH_AND_PIXELS)


@pytest.mark.parametrize("activation", ["relu", "GELU", "", False])
def test_unknown_activations_are_refused(device, activation):
    with pytest.raises(ValueError, match=r"^norm_pointwise: activation is .*, expected one of None, 'gelu'"):
        norm_pointwise(**tensors_of(device), activation=activation)

"""norm_conv3x3: LayerNorm (or none), dense 3x3 convolution, GELU (or not), 1x1 convolution (or none)."""

import itertools

import kit
import pytest
import torch

from seemore_fast.ops import norm_conv3x3

each_option = pytest.mark.parametrize(
    "norm, pointwise, activation", list(itertools.product([1, 0], [1, 0], ["gelu", None]))
)


def naive_norm_conv3x3(
    x, norm_weight, norm_bias, weight, bias, weight_pw=None, bias_pw=None, activation=None, eps=1e-6
):
    if norm_weight is not None:
        x = kit.naive_layer_norm(x, norm_weight, norm_bias, eps)
    y = kit.naive_activation(kit.naive_dense(x, weight, bias), activation)
    return y if weight_pw is None else kit.naive_pointwise(y, weight_pw, bias_pw)


def case_of(device, shape=(2, 3, 6, 7), norm=True, pointwise=True, activation="gelu", middle=5, out=4):
    """Return the tensors that there are, and the options: those that are None, and the activation."""
    shapes = {"x": shape}
    options = {"activation": activation}
    if norm:
        shapes |= kit.norm_shapes(shape[1])
    else:
        options |= {"norm_weight": None, "norm_bias": None}
    shapes |= {"weight": (middle, shape[1], 3, 3), "bias": (middle,)}
    if pointwise:
        shapes |= {"weight_pw": (out, middle, 1, 1), "bias_pw": (out,)}
    return kit.random_parameters(shapes, device), options


@kit.each_backend("norm_conv3x3")
@kit.each_shape
@each_option
def test_values(backend, device, shape, norm, pointwise, activation):
    tensors, options = case_of(device, shape, norm, pointwise, activation, shape[1], 2 * shape[1])
    kit.assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, **options)


@kit.each_backend("norm_conv3x3")
@pytest.mark.parametrize("middle, out", [(1, 1), (7, 2), (2, 19)])
def test_numbers_of_channels(backend, device, middle, out):
    tensors, options = case_of(device, middle=middle, out=out)
    kit.assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, **options)


@kit.each_backend("norm_conv3x3")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(backend, device, eps):
    tensors, options = case_of(device)
    kit.assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, eps=eps, **options)


@kit.each_backend("norm_conv3x3")
def test_border_sees_zeros_after_the_norm(backend, device):
    """LN of one channel is its bias, 1: a sum over 3x3 of it counts the taps inside of the image."""
    one = torch.ones(1, dtype=torch.float64, device=device)
    x, weight = one.expand(1, 1, 3, 3), one.expand(1, 1, 3, 3)
    with kit.chosen(backend, device):
        y = norm_conv3x3(x, one, one, weight, 0 * one)
    assert y.tolist() == [[[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]]


@kit.each_backend("norm_conv3x3")
@kit.each_layout
@each_option
def test_layouts(backend, device, layout, norm, pointwise, activation):
    tensors, options = case_of(device, norm=norm, pointwise=pointwise, activation=activation)
    kit.assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, layout, **options)


@kit.each_backend("norm_conv3x3")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors, options = case_of(device, (2, 8, 17, 19), middle=8, out=16)
    tensors["x"] *= spread
    kit.assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, dtype, layout, **options)


@kit.each_backend("norm_conv3x3")
@each_option
def test_gradcheck(backend, device, norm, pointwise, activation):
    tensors, options = case_of(device, (2, 3, 2, 3), norm, pointwise, activation, middle=2, out=3)
    with kit.chosen(backend, device):
        kit.assert_gradcheck(norm_conv3x3, tensors, **options)


@kit.each_backend("norm_conv3x3")
@pytest.mark.parametrize("norm, pointwise", [(True, True), (False, False)])
def test_compiles(backend, device, norm, pointwise):
    (small, options), (other, _) = (case_of(device, shape, norm, pointwise) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with kit.chosen(backend, device):
        kit.assert_compiles(norm_conv3x3, small, other, **options)


@kit.each_fault
def test_bad_tensors(device, fault):
    tensors, options = case_of(device)
    exempt = ["norm_weight", "norm_bias", "weight_pw", "bias_pw"] if fault == "none" else []
    kit.assert_refused(fault, norm_conv3x3, tensors, exempt, **options)


def test_bad_sizes(device):
    tensors, options = case_of(device)
    kit.assert_sizes_refused(norm_conv3x3, tensors, free=kit.BATCH_AND_PIXELS, **options)


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "weight_pw", "bias_pw"])
def test_half_a_pair_is_refused(device, missing):
    tensors, options = case_of(device)
    with pytest.raises((TypeError, ValueError), match=rf"^norm_conv3x3: .*\b{missing}\b.* None"):
        norm_conv3x3(**tensors | {missing: None}, **options)


@pytest.mark.parametrize("activation", ["relu", "GELU", "", False])
def test_unknown_activations_are_refused(device, activation):
    tensors, options = case_of(device)
    with pytest.raises(ValueError, match=r"^norm_conv3x3: activation is .*, expected one of None, 'gelu'"):
        norm_conv3x3(**tensors, **options | {"activation": activation})

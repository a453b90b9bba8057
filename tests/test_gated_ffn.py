"""gated_ffn: x + GatedFFN(LayerNorm(x))."""

import kit
import pytest
from test_depthwise_gate import naive_depthwise_gate

from seemore_fast.ops import gated_ffn


def naive_gated_ffn(x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps=1e-6):
    channels = x.shape[1]
    ug = kit.naive_gelu(kit.naive_pointwise(kit.naive_layer_norm(x, norm_weight, norm_bias, eps), weight_1, bias_1))
    gated = naive_depthwise_gate(ug[:, :channels], ug[:, channels:], weight_gate, bias_gate)
    return x + kit.naive_gelu(kit.naive_pointwise(gated, weight_2, bias_2))


def tensors_of(device, shape=(2, 3, 6, 7)):
    return kit.random_parameters({"x": shape} | kit.norm_shapes(shape[1]) | kit.ffn_shapes(shape[1]), device)


@kit.each_backend("gated_ffn")
@kit.each_shape
def test_values(backend, device, shape):
    kit.assert_close_to_naive(backend, gated_ffn, naive_gated_ffn, tensors_of(device, shape))


@kit.each_backend("gated_ffn")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(backend, device, eps):
    kit.assert_close_to_naive(backend, gated_ffn, naive_gated_ffn, tensors_of(device), eps=eps)


@kit.each_backend("gated_ffn")
@kit.each_layout
def test_layouts(backend, device, layout):
    kit.assert_close_to_naive(backend, gated_ffn, naive_gated_ffn, tensors_of(device), layout)


@kit.each_backend("gated_ffn")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors = tensors_of(device, (2, 8, 17, 19))
    tensors["x"] *= spread
    kit.assert_within_yardstick(backend, gated_ffn, naive_gated_ffn, tensors, dtype, layout)


@kit.each_backend("gated_ffn")
def test_gradcheck(backend, device):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(gated_ffn, tensors_of(device, (2, 3, 2, 3)))


@kit.each_backend("gated_ffn")
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(gated_ffn, tensors_of(device), tensors_of(device, (3, 3, 9, 5)))


@kit.each_fault
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, gated_ffn, tensors_of(device))


def test_bad_sizes(device):
    kit.assert_sizes_refused(gated_ffn, tensors_of(device), free=kit.BATCH_AND_PIXELS)

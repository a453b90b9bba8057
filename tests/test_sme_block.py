"""sme_block: Spatial Modulating Expert, SEE and then GatedFFN."""

import kit
import pytest
import torch
from test_gated_ffn import naive_gated_ffn
from test_norm_pointwise import naive_norm_pointwise
from test_striped_conv import naive_striped_conv

from seemore_fast.ops import sme_block


def naive_sme_block(
    x,
    norm_1_weight,
    norm_1_bias,
    weight_qv,
    bias_qv,
    weight_row,
    bias_row,
    weight_col,
    bias_col,
    weight_proj,
    bias_proj,
    norm_2_weight,
    norm_2_bias,
    **ffn,
):
    channels = x.shape[1]
    qv = naive_norm_pointwise(x, norm_1_weight, norm_1_bias, weight_qv, bias_qv, "gelu")
    q = naive_striped_conv(qv[:, :channels], weight_row, bias_row, weight_col, bias_col)
    x = x + kit.naive_pointwise(q * qv[:, channels:], weight_proj, bias_proj)
    return naive_gated_ffn(x, norm_2_weight, norm_2_bias, **ffn)


def tensors_of(device, shape=(2, 3, 6, 7), taps=5):
    channels = shape[1]
    shapes = {"x": shape} | kit.norm_shapes(channels, "norm_1")
    shapes |= {"weight_qv": (2 * channels, channels, 1, 1), "bias_qv": (2 * channels,)}
    shapes |= kit.striped_shapes(channels, taps)
    shapes |= {"weight_proj": (channels, channels, 1, 1), "bias_proj": (channels,)}
    shapes |= kit.norm_shapes(channels, "norm_2") | kit.ffn_shapes(channels)
    return kit.random_parameters(shapes, device)


@kit.each_backend("sme_block")
@kit.each_shape
@pytest.mark.parametrize("taps", [1, 3, 11, 31])
def test_values(backend, device, shape, taps):
    kit.assert_close_to_naive(backend, sme_block, naive_sme_block, tensors_of(device, shape, taps))


@kit.each_backend("sme_block")
@kit.each_layout
def test_layouts(backend, device, layout):
    kit.assert_close_to_naive(backend, sme_block, naive_sme_block, tensors_of(device), layout)


@kit.each_backend("sme_block")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors = tensors_of(device, (2, 8, 17, 19), taps=11)
    tensors["x"] *= spread
    kit.assert_within_yardstick(backend, sme_block, naive_sme_block, tensors, dtype, layout)


@kit.each_backend("sme_block", dtype=torch.float64)
def test_gradcheck(backend, device):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(sme_block, tensors_of(device, (2, 2, 3, 3), taps=3))


@kit.each_backend("sme_block")
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(sme_block, tensors_of(device), tensors_of(device, (3, 3, 9, 5)))


@kit.each_fault
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, sme_block, tensors_of(device))


def test_bad_sizes(device):
    kit.assert_sizes_refused(sme_block, tensors_of(device), free=kit.BATCH_AND_PIXELS)


@pytest.mark.parametrize("taps", [0, 2, 4])
def test_even_kernels_are_refused(device, taps):
    with pytest.raises(ValueError, match=f"^sme_block: weight_row has {taps} taps, expected an odd number"):
        sme_block(**tensors_of(device, taps=taps))


# On the kernels of its parts


@kit.each_kernel("gated_ffn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_of_kernels(backend, device, dtype, layout):
    tensors = tensors_of(device, (2, 12, 7, 18), taps=11)
    kit.assert_within_yardstick(backend, sme_block, naive_sme_block, tensors, dtype, layout)


@kit.each_kernel("gated_ffn")
def test_of_kernels_is_one_graph(backend, device):
    calls = (kit.cast(tensors_of(device, shape), torch.float32) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with kit.chosen(backend, device):
        kit.assert_compiles(sme_block, *calls)

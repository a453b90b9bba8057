"""sme_block: Spatial Modulating Expert, SEE and then GatedFFN."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_conv1x1, naive_gated_ffn, naive_norm_pointwise, naive_striped_conv
from helpers.ops import (
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_within_yardstick,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    ffn_shapes,
    norm_shapes,
    random_parameters,
    striped_shapes,
)

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
    x = x + naive_conv1x1(q * qv[:, channels:], weight_proj, bias_proj)
    return naive_gated_ffn(x, norm_2_weight, norm_2_bias, **ffn)


def tensors_of(device, shape=(2, 3, 6, 7), taps=5):
    channels = shape[1]
    shapes = {"x": shape} | norm_shapes(channels, "norm_1")
    shapes |= {"weight_qv": (2 * channels, channels, 1, 1), "bias_qv": (2 * channels,)}
    shapes |= striped_shapes(channels, taps)
    shapes |= {"weight_proj": (channels, channels, 1, 1), "bias_proj": (channels,)}
    shapes |= norm_shapes(channels, "norm_2") | ffn_shapes(channels)
    return random_parameters(shapes, device)


@each_backend("sme_block")
@each_shape
@pytest.mark.parametrize("taps", [1, 3, 11, 31])
def test_values(backend, device, shape, taps):
    assert_close_to_naive(backend, sme_block, naive_sme_block, tensors_of(device, shape, taps))


@each_backend("sme_block")
@each_layout
def test_layouts(backend, device, layout):
    assert_close_to_naive(backend, sme_block, naive_sme_block, tensors_of(device), layout)


@each_backend("sme_block")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors = tensors_of(device, (2, 8, 17, 19), taps=11)
    tensors["x"] *= spread
    assert_within_yardstick(backend, sme_block, naive_sme_block, tensors, dtype, layout)


@each_backend("sme_block", dtype=torch.float64)
def test_gradcheck(backend, device):
    with running_on(backend, device):
        assert_gradcheck(sme_block, tensors_of(device, (2, 2, 3, 3), taps=3))


@each_backend("sme_block")
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(sme_block, tensors_of(device), tensors_of(device, (3, 3, 9, 5)))


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, sme_block, tensors_of(device))


def test_bad_sizes(device):
    assert_sizes_refused(sme_block, tensors_of(device), free=BATCH_AND_PIXELS)


@pytest.mark.parametrize("taps", [0, 2, 4])
def test_even_kernels_are_refused(device, taps):
    with pytest.raises(ValueError, match=f"^sme_block: weight_row has {taps} taps, expected an odd number"):
        sme_block(**tensors_of(device, taps=taps))


# On the kernels of its parts


@each_kernel("gated_ffn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_of_kernels(backend, device, dtype, layout):
    tensors = tensors_of(device, (2, 12, 7, 18), taps=11)
    assert_within_yardstick(backend, sme_block, naive_sme_block, tensors, dtype, layout)


@each_kernel("gated_ffn")
def test_of_kernels_is_one_graph(backend, device):
    calls = (cast(tensors_of(device, shape), torch.float32) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with running_on(backend, device):
        assert_compiles(sme_block, *calls)

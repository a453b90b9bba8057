"""striped_conv: depthwise 1xK, then Kx1."""

import kit
import pytest
import torch

from seemore_fast.ops import striped_conv

each_option = pytest.mark.parametrize(
    "activation, gated", [(None, False), ("gelu", False), (None, True), ("gelu", True)]
)


def naive_striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation=None, gate=None):
    y = kit.naive_depthwise(kit.naive_depthwise(x, weight_row, bias_row), weight_col, bias_col)
    y = kit.naive_activation(y, activation)
    return y if gate is None else gate * y


def tensors_of(device, shape=(2, 3, 6, 7), taps=5, gated=True):
    images = {"x": shape, "gate": shape} if gated else {"x": shape}
    return kit.random_parameters(images | kit.striped_shapes(shape[1], taps), device)


@kit.each_backend
@kit.each_shape
@pytest.mark.parametrize("taps", [1, 3, 7, 11, 31])
def test_values(backend, device, shape, taps):
    tensors = tensors_of(device, shape, taps)
    kit.assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors, activation="gelu")


@kit.each_backend
@each_option
def test_options(backend, device, activation, gated):
    tensors = tensors_of(device, gated=gated)
    kit.assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors, activation=activation)


@kit.each_backend
def test_pixels_outside_are_zero_in_both_steps(backend, device):
    """One pixel of 0, bias_row 1, all taps 1: the column step sees bias_row once, zeros above and below."""
    ones = torch.ones(1, 1, 1, 3, dtype=torch.float64, device=device)
    one, zero = ones[0, 0, 0, :1], ones.new_zeros(1)
    with kit.chosen(backend, device):
        y = striped_conv(zero[None, None, None], ones, one, ones.transpose(2, 3), zero)
    assert y.tolist() == [[[[1.0]]]]


@kit.each_backend
@kit.each_layout
@each_option
def test_layouts(backend, device, layout, activation, gated):
    tensors = tensors_of(device, gated=gated)
    kit.assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors, layout, activation=activation)


@kit.each_backend
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("taps", [3, 11])
def test_narrow_dtypes(backend, device, dtype, layout, taps):
    tensors = tensors_of(device, (2, 8, 17, 19), taps)
    kit.assert_within_yardstick(backend, striped_conv, naive_striped_conv, tensors, dtype, layout, activation="gelu")


@kit.each_backend
@each_option
def test_gradcheck(backend, device, activation, gated):
    tensors = tensors_of(device, (2, 2, 3, 4), gated=gated)
    with kit.chosen(backend, device):
        kit.assert_gradcheck(striped_conv, tensors, activation=activation)


@kit.each_backend
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(striped_conv, tensors_of(device), tensors_of(device, (3, 3, 9, 5)), activation="gelu")


@kit.each_fault
def test_bad_tensors(device, fault):
    exempt = ["gate"] if fault == "none" else []
    kit.assert_refused(fault, striped_conv, tensors_of(device), exempt)


def test_bad_sizes(device):
    kit.assert_sizes_refused(striped_conv, tensors_of(device))


@pytest.mark.parametrize("taps", [0, 2, 4])
def test_even_kernels_are_refused(device, taps):
    with pytest.raises(ValueError, match=f"^striped_conv: weight_row has {taps} taps, expected an odd number"):
        striped_conv(**tensors_of(device, taps=taps))


@pytest.mark.parametrize("activation", ["relu", "GELU", "", False])
def test_unknown_activations_are_refused(device, activation):
    with pytest.raises(ValueError, match=r"^striped_conv: activation is .*, expected one of None, 'gelu'"):
        striped_conv(**tensors_of(device), activation=activation)

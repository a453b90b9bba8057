"""depthwise_gate: u * depthwise3x3(g)."""

import kit
import pytest

from seemore_fast.ops import depthwise_gate


def naive_depthwise_gate(u, g, weight, bias):
    return u * kit.naive_depthwise(g, weight, bias)


def tensors_of(device, shape=(2, 3, 6, 7)):
    return kit.random_parameters({"u": shape, "g": shape, "weight": (shape[1], 1, 3, 3), "bias": (shape[1],)}, device)


@kit.each_backend("depthwise_gate")
@kit.each_shape
def test_values(backend, device, shape):
    kit.assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape))


@kit.each_backend("depthwise_gate")
@kit.each_layout
def test_layouts(backend, device, layout):
    kit.assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device), layout)


@kit.each_backend("depthwise_gate")
def test_halves_of_one_tensor(backend, device):
    """As GatedFFN calls it: u and g are the chunks of one tensor, strided over the batch."""
    tensors = tensors_of(device)
    u, g = (tensors["u"] + tensors["g"]).repeat(1, 2, 1, 1).chunk(2, dim=1)
    tensors |= {"u": u, "g": g}
    kit.assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors)


@kit.each_backend("depthwise_gate")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_narrow_dtypes(backend, device, dtype, layout):
    tensors = tensors_of(device, (2, 8, 17, 19))
    kit.assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors, dtype, layout)


@kit.each_backend("depthwise_gate")
def test_gradcheck(backend, device):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(depthwise_gate, tensors_of(device, (2, 2, 3, 4)))


@kit.each_backend("depthwise_gate")
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(depthwise_gate, tensors_of(device), tensors_of(device, (3, 3, 9, 5)))


@kit.each_fault
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, depthwise_gate, tensors_of(device))


def test_bad_sizes(device):
    kit.assert_sizes_refused(depthwise_gate, tensors_of(device))


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_other_kernel_sizes_are_refused(device, taps):
    tensors = tensors_of(device)
    tensors["weight"] = tensors["weight"][..., :1, :1].repeat(1, 1, taps, taps)
    with pytest.raises(ValueError, match=rf"^depthwise_gate: weight has shape \(3, 1, {taps}, {taps}\), expected"):
        depthwise_gate(**tensors)

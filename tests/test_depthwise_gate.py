"""depthwise_gate: u * depthwise3x3(g)."""

import kit
import pytest
import torch

from seemore_fast import reference
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


@kit.each_backend("depthwise_gate", interpreted=False, dtype=torch.float64)
def test_gradcheck(backend, device):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(depthwise_gate, tensors_of(device, (2, 2, 3, 4)))


@kit.each_backend("depthwise_gate")
def test_compiles(backend, device):
    small, other = (kit.cast(tensors_of(device, shape), backend.widest) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with kit.chosen(backend, device):
        kit.assert_compiles(depthwise_gate, small, other)


# Kernels, which float32, float16 and bfloat16 have


def float_tensors(device, shape=(2, 3, 6, 7), dtype=torch.float32):
    return kit.cast(tensors_of(device, shape), dtype)


@kit.each_kernel("depthwise_gate", interpreted=False)
@kit.each_shape
@kit.each_narrow_dtype
def test_small_images(backend, device, shape, dtype):
    kit.assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), dtype)


@kit.each_kernel("depthwise_gate")
def test_no_images(backend, device):
    tensors = float_tensors(device, (0, 3, 4, 5))
    with kit.chosen(backend, device):
        found = kit.value_and_gradients(depthwise_gate, tensors)
    assert found["y"].shape == (0, 3, 4, 5)
    assert not found["gradient of weight"].any() and not found["gradient of bias"].any()


@kit.each_kernel("depthwise_gate", interpreted=False)
@kit.each_narrow_dtype
@pytest.mark.parametrize(
    "shape", [(2, 3, 70, 260), (1, 2, 64, 128), (1, 3, 83, 129), (3, 1, 41, 64), (3, 3, 20, 12)], ids=str
)
def test_more_than_one_strip(backend, device, shape, dtype):
    """CUDA's: of 64 or 128 columns, neighbours to the right and below, widths of quads and not, two a warp."""
    kit.assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), dtype)


@kit.each_kernel("depthwise_gate")
@pytest.mark.parametrize("shape", [(2, 2, 19, 70), (1, 1, 150, 70), (1, 2, 40, 5)], ids=str)
def test_more_than_one_tile(backend, device, shape):
    """Triton's: of strips of 16 rows, up to 8 strips and 64 columns."""
    kit.assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), torch.float32)


@kit.each_kernel("depthwise_gate", interpreted=False)
@pytest.mark.parametrize(
    "shape, layout", [((1, 1, 530, 3), None), ((1, 1, 2, 1060), None), ((1, 70, 3, 150), "channels_last")], ids=str
)
def test_tiles_of_the_cpu(backend, device, shape, layout):
    """Bands of 256 lines, columns of 1024 (64 where channels lie side by side), 64 channels."""
    kit.assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), layout)


@kit.each_kernel("depthwise_gate", interpreted=False)
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (3, 2, 6, 64)], ids=str)
def test_images_are_alone(backend, device, shape):
    with kit.chosen(backend, device):
        kit.assert_images_are_alone(depthwise_gate, float_tensors(device, shape))


@kit.each_kernel("depthwise_gate")
@kit.each_layout
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 2, 10, 16)], ids=str)
def test_layouts_of_kernels(backend, device, layout, shape):
    tensors = tensors_of(device, shape)
    kit.assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors, torch.float32, layout)


@kit.each_kernel("depthwise_gate")
def test_opcheck(backend, device):
    with kit.chosen(backend, device):
        kit.assert_opcheck(depthwise_gate, float_tensors(device))
        kit.assert_opcheck(
            depthwise_gate, {name: kit.LAYOUTS["channels_last"](t) for name, t in float_tensors(device).items()}
        )


@kit.each_kernel("depthwise_gate")
@pytest.mark.parametrize("shape", [(2, 5, 13, 19), (1, 3, 40, 136)], ids=str)
def test_writes_its_results_only(backend, device, shape):
    with kit.chosen(backend, device):
        kit.assert_writes_its_results_only(depthwise_gate, float_tensors(device, shape))


@kit.each_backend("depthwise_gate")
def test_large_offsets(backend, device):
    with kit.chosen(backend, device):
        tensors = float_tensors(device, (2, 2, 3, 5), torch.bfloat16)
        kit.assert_large_offsets(depthwise_gate, tensors, ["u", "g"])


@kit.each_kernel("depthwise_gate", interpreted=False)
def test_deterministic(backend, device):
    with kit.chosen(backend, device):
        kit.assert_deterministic(depthwise_gate, float_tensors(device, (2, 3, 70, 40)))


@kit.each_kernel("depthwise_gate")
def test_double_backward_is_refused(backend, device):
    with kit.chosen(backend, device):
        kit.assert_refuses_double_backward(depthwise_gate, float_tensors(device))


@kit.each_backend("depthwise_gate")
def test_autocast(backend, device):
    """All inputs are cast; gradients have their own dtypes."""
    tensors = float_tensors(device)
    with kit.chosen(backend, device):
        narrow = depthwise_gate(**kit.cast(tensors, torch.bfloat16))
        with torch.autocast(device, torch.bfloat16):
            found = kit.value_and_gradients(depthwise_gate, tensors)
    assert torch.equal(found["y"], narrow)
    assert all(value.dtype == torch.float32 for what, value in found.items() if what != "y")


@kit.each_kernel("depthwise_gate")
def test_extreme_values(backend, device):
    """Infinities and NaN come out where torch's own operators have them."""
    tensors = float_tensors(device, (1, 1, 5, 40))
    for column, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30)):
        tensors["g"][0, 0, 2, 6 * column] = value
    with kit.chosen(backend, device):
        y = depthwise_gate(**tensors)
    torch.testing.assert_close(y, reference.depthwise_gate(**tensors), equal_nan=True, rtol=1e-5, atol=1e-5)


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

"""depthwise_gate: u * depthwise3x3(g)."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_depthwise_gate
from helpers.ops import (
    LAYOUTS,
    assert_close_to_naive,
    assert_compiles,
    assert_deterministic,
    assert_gradcheck,
    assert_images_are_alone,
    assert_large_offsets,
    assert_opcheck,
    assert_refuses_double_backward,
    assert_within_yardstick,
    assert_writes_its_results_only,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    random_parameters,
    value_and_gradients,
)

from seemore_fast import reference
from seemore_fast.ops import depthwise_gate


def tensors_of(device, shape=(2, 3, 6, 7)):
    return random_parameters({"u": shape, "g": shape, "weight": (shape[1], 1, 3, 3), "bias": (shape[1],)}, device)


@each_backend("depthwise_gate")
@each_shape
def test_values(backend, device, shape):
    assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape))


@each_backend("depthwise_gate")
@each_layout
def test_layouts(backend, device, layout):
    assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device), layout)


@each_backend("depthwise_gate")
def test_halves_of_one_tensor(backend, device):
    """As GatedFFN calls it: u and g are the chunks of one tensor, strided over the batch."""
    tensors = tensors_of(device)
    u, g = (tensors["u"] + tensors["g"]).repeat(1, 2, 1, 1).chunk(2, dim=1)
    tensors |= {"u": u, "g": g}
    assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors)


@each_backend("depthwise_gate")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_narrow_dtypes(backend, device, dtype, layout):
    tensors = tensors_of(device, (2, 8, 17, 19))
    assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors, dtype, layout)


@each_backend("depthwise_gate", interpreted=False, dtype=torch.float64)
def test_gradcheck(backend, device):
    with running_on(backend, device):
        assert_gradcheck(depthwise_gate, tensors_of(device, (2, 2, 3, 4)))


@each_backend("depthwise_gate")
def test_compiles(backend, device):
    small, other = (cast(tensors_of(device, shape), backend.widest) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with running_on(backend, device):
        assert_compiles(depthwise_gate, small, other)


# Kernels, which float32, float16 and bfloat16 have


def float_tensors(device, shape=(2, 3, 6, 7), dtype=torch.float32):
    return cast(tensors_of(device, shape), dtype)


@each_kernel("depthwise_gate", interpreted=False)
@each_shape
@each_narrow_dtype
def test_small_images(backend, device, shape, dtype):
    assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), dtype)


@each_kernel("depthwise_gate")
def test_no_images(backend, device):
    tensors = float_tensors(device, (0, 3, 4, 5))
    with running_on(backend, device):
        found = value_and_gradients(depthwise_gate, tensors)
    assert found["y"].shape == (0, 3, 4, 5)
    assert not found["gradient of weight"].any() and not found["gradient of bias"].any()


@each_kernel("depthwise_gate", interpreted=False)
@each_narrow_dtype
@pytest.mark.parametrize(
    "shape", [(2, 3, 70, 260), (1, 2, 64, 128), (1, 3, 83, 129), (3, 1, 41, 64), (3, 3, 20, 12)], ids=str
)
def test_more_than_one_strip(backend, device, shape, dtype):
    """CUDA's: of 64 or 128 columns, neighbours to the right and below, widths of quads and not, two a warp."""
    assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), dtype)


@each_kernel("depthwise_gate")
@pytest.mark.parametrize("shape", [(2, 2, 19, 70), (1, 1, 150, 70), (1, 2, 40, 5)], ids=str)
def test_more_than_one_tile(backend, device, shape):
    """Triton's: of strips of 16 rows, up to 8 strips and 64 columns."""
    assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), torch.float32)


@each_kernel("depthwise_gate", interpreted=False)
@pytest.mark.parametrize(
    "shape, layout", [((1, 1, 530, 3), None), ((1, 1, 2, 1060), None), ((1, 70, 3, 150), "channels_last")], ids=str
)
def test_tiles_of_the_cpu(backend, device, shape, layout):
    """Bands of 256 lines, columns of 1024 (64 where channels lie side by side), 64 channels."""
    assert_close_to_naive(backend, depthwise_gate, naive_depthwise_gate, tensors_of(device, shape), layout)


@each_kernel("depthwise_gate", interpreted=False)
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (3, 2, 6, 64)], ids=str)
def test_images_are_alone(backend, device, shape):
    with running_on(backend, device):
        assert_images_are_alone(depthwise_gate, float_tensors(device, shape))


@each_kernel("depthwise_gate")
@each_layout
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 2, 10, 16)], ids=str)
def test_layouts_of_kernels(backend, device, layout, shape):
    tensors = tensors_of(device, shape)
    assert_within_yardstick(backend, depthwise_gate, naive_depthwise_gate, tensors, torch.float32, layout)


@each_kernel("depthwise_gate")
def test_opcheck(backend, device):
    with running_on(backend, device):
        assert_opcheck(depthwise_gate, float_tensors(device))
        assert_opcheck(depthwise_gate, {name: LAYOUTS["channels_last"](t) for name, t in float_tensors(device).items()})


@each_kernel("depthwise_gate")
@pytest.mark.parametrize("shape", [(2, 5, 13, 19), (1, 3, 40, 136)], ids=str)
def test_writes_its_results_only(backend, device, shape):
    with running_on(backend, device):
        assert_writes_its_results_only(depthwise_gate, float_tensors(device, shape))


@each_backend("depthwise_gate")
def test_large_offsets(backend, device):
    with running_on(backend, device):
        tensors = float_tensors(device, (2, 2, 3, 5), torch.bfloat16)
        assert_large_offsets(depthwise_gate, tensors, ["u", "g"])


@each_kernel("depthwise_gate", interpreted=False)
def test_deterministic(backend, device):
    with running_on(backend, device):
        assert_deterministic(depthwise_gate, float_tensors(device, (2, 3, 70, 40)))


@each_kernel("depthwise_gate")
def test_double_backward_is_refused(backend, device):
    with running_on(backend, device):
        assert_refuses_double_backward(depthwise_gate, float_tensors(device))


@each_backend("depthwise_gate")
def test_autocast(backend, device):
    """All inputs are cast; gradients have their own dtypes."""
    tensors = float_tensors(device)
    with running_on(backend, device):
        narrow = depthwise_gate(**cast(tensors, torch.bfloat16))
        with torch.autocast(device, torch.bfloat16):
            found = value_and_gradients(depthwise_gate, tensors)
    assert torch.equal(found["y"], narrow)
    assert all(value.dtype == torch.float32 for what, value in found.items() if what != "y")


@each_kernel("depthwise_gate")
def test_extreme_values(backend, device):
    """Infinities and NaN come out where torch's own operators have them."""
    tensors = float_tensors(device, (1, 1, 5, 40))
    for column, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30)):
        tensors["g"][0, 0, 2, 6 * column] = value
    with running_on(backend, device):
        y = depthwise_gate(**tensors)
    torch.testing.assert_close(y, reference.depthwise_gate(**tensors), equal_nan=True, rtol=1e-5, atol=1e-5)


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, depthwise_gate, tensors_of(device))


def test_bad_sizes(device):
    assert_sizes_refused(depthwise_gate, tensors_of(device))


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_other_kernel_sizes_are_refused(device, taps):
    tensors = tensors_of(device)
    tensors["weight"] = tensors["weight"][..., :1, :1].repeat(1, 1, taps, taps)
    with pytest.raises(ValueError, match=rf"^depthwise_gate: weight has shape \(3, 1, {taps}, {taps}\), expected"):
        depthwise_gate(**tensors)

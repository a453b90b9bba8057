"""calibrate: k + a smooth map of its surroundings."""

import kit
import pytest

from seemore_fast.ops import calibrate

each_case = pytest.mark.parametrize(
    "shape, recursive",
    [
        ((1, 1, 4, 4), 1),  # a small map of one pixel
        ((2, 3, 5, 7), 1),  # what 4x4 blocks do not cover is dropped, the map is stretched over it
        ((0, 3, 5, 7), 1),
        ((1, 5, 4, 31), 1),
        ((1, 36, 9, 8), 1),
        ((1, 1, 16, 16), 2),
        ((2, 3, 17, 31), 2),
        ((1, 4, 35, 66), 2),
        ((1, 2, 64, 69), 3),
    ],
    ids=str,
)


def interpolation(size, new_size, like):
    """Matrix (new_size, size) of the linear interpolation between pixel centres, constant beyond the outer ones."""
    matrix = like.new_zeros(new_size, size)
    for i in range(new_size):
        position = min(max((i + 0.5) * size / new_size - 0.5, 0), size - 1)
        left = int(position)
        right = min(left + 1, size - 1)
        matrix[i, left] += 1 - (position - left)
        matrix[i, right] += position - left
    return matrix


def naive_calibrate(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive):
    s = k
    for _ in range(recursive):
        height, width = s.shape[2] // 4 * 4, s.shape[3] // 4 * 4
        taps = [(i, j, s[:, :, i:height:4, j:width:4]) for i in range(4) for j in range(4)]
        s = sum(kit.per_channel(weight_agg[:, 0, i, j]) * seen for i, j, seen in taps) + kit.per_channel(bias_agg)
        s = kit.naive_gelu(s)
    s = kit.naive_pointwise(kit.naive_depthwise(s, weight_dw, bias_dw), weight_pw, bias_pw)
    rows, columns = (interpolation(s.shape[dim], k.shape[dim], k) for dim in (2, 3))
    return k + rows @ s @ columns.t()


def tensors_of(device, shape=(2, 3, 9, 14)):
    return kit.random_parameters({"k": shape} | kit.calibrate_shapes(shape[1]), device)


@kit.each_backend("calibrate")
@each_case
def test_values(backend, device, shape, recursive):
    tensors = tensors_of(device, shape)
    kit.assert_close_to_naive(backend, calibrate, naive_calibrate, tensors, recursive=recursive)


@kit.each_backend("calibrate")
@kit.each_layout
@pytest.mark.parametrize("shape, recursive", [((2, 3, 9, 14), 1), ((2, 3, 17, 20), 2)], ids=str)
def test_layouts(backend, device, layout, shape, recursive):
    tensors = tensors_of(device, shape)
    kit.assert_close_to_naive(backend, calibrate, naive_calibrate, tensors, layout, recursive=recursive)


@kit.each_backend("calibrate")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("recursive", [1, 2])
def test_narrow_dtypes(backend, device, dtype, layout, recursive):
    tensors = tensors_of(device, (2, 8, 33, 35))
    kit.assert_within_yardstick(backend, calibrate, naive_calibrate, tensors, dtype, layout, recursive=recursive)


@kit.each_backend("calibrate")
@pytest.mark.parametrize("shape, recursive", [((2, 2, 5, 9), 1), ((1, 1, 16, 18), 2)], ids=str)
def test_gradcheck(backend, device, shape, recursive):
    with kit.chosen(backend, device):
        kit.assert_gradcheck(calibrate, tensors_of(device, shape), recursive=recursive)


@kit.each_backend("calibrate")
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(calibrate, tensors_of(device), tensors_of(device, (3, 3, 11, 17)), recursive=1)


@kit.each_fault
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, calibrate, tensors_of(device), recursive=1)


def test_bad_sizes(device):
    free = [("k", 0), ("k", 2), ("k", 3)]
    kit.assert_sizes_refused(calibrate, tensors_of(device), free, recursive=1)


@pytest.mark.parametrize("height, width, recursive", [(3, 4, 1), (4, 3, 1), (15, 16, 2), (16, 15, 2), (63, 64, 3)])
def test_too_small_images_are_refused(device, height, width, recursive):
    least = 4**recursive
    with pytest.raises(
        ValueError, match=f"^calibrate: k is {height}x{width} pixels, expected at least {least}x{least}"
    ):
        calibrate(**tensors_of(device, (1, 3, height, width)), recursive=recursive)


@pytest.mark.parametrize("recursive", [0, -1, 1.0, "1", None])
def test_bad_recursive_is_refused(device, recursive):
    with pytest.raises(ValueError, match=f"^calibrate: recursive is {recursive!r}, expected an integer of at least 1"):
        calibrate(**tensors_of(device), recursive=recursive)

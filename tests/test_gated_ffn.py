"""gated_ffn: x + GatedFFN(LayerNorm(x))."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_gated_ffn
from helpers.ops import (
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_large_offsets,
    assert_operator,
    assert_within_yardstick,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    ffn_shapes,
    largest_difference,
    norm_shapes,
    random_parameters,
    value_and_gradients,
)

from seemore_fast.ops import gated_ffn


def tensors_of(device, shape=(2, 3, 6, 7)):
    return random_parameters({"x": shape} | norm_shapes(shape[1]) | ffn_shapes(shape[1]), device)


@each_backend("gated_ffn")
@each_shape
def test_values(backend, device, shape):
    assert_close_to_naive(backend, gated_ffn, naive_gated_ffn, tensors_of(device, shape))


@each_backend("gated_ffn")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(backend, device, eps):
    assert_close_to_naive(backend, gated_ffn, naive_gated_ffn, tensors_of(device), eps=eps)


@each_backend("gated_ffn")
@each_layout
def test_layouts(backend, device, layout):
    assert_close_to_naive(backend, gated_ffn, naive_gated_ffn, tensors_of(device), layout)


@each_backend("gated_ffn")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors = tensors_of(device, (2, 8, 17, 19))
    tensors["x"] *= spread
    assert_within_yardstick(backend, gated_ffn, naive_gated_ffn, tensors, dtype, layout)


@each_backend("gated_ffn", dtype=torch.float64)
def test_gradcheck(backend, device):
    with running_on(backend, device):
        assert_gradcheck(gated_ffn, tensors_of(device, (2, 3, 2, 3)))


@each_backend("gated_ffn", dtype=torch.float64)
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(gated_ffn, tensors_of(device), tensors_of(device, (3, 3, 9, 5)))


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, gated_ffn, tensors_of(device))


def test_bad_sizes(device):
    assert_sizes_refused(gated_ffn, tensors_of(device), free=BATCH_AND_PIXELS)


# Kernels, which float32, float16 and bfloat16 have


def float_tensors(device, shape=(2, 3, 6, 7), dtype=torch.float32):
    return cast(tensors_of(device, shape), dtype)


@each_kernel("gated_ffn")
@pytest.mark.parametrize("shape", [(1, 4, 40, 40), (2, 3, 51, 33)], ids=str)
def test_many_lines(backend, device, shape):
    """More lines than a kernel takes at a time: what a step leaves for the next one."""
    if backend == "triton":
        pytest.skip("slow in the interpreter, and its kernels take tiles")
    assert_within_yardstick(backend, gated_ffn, naive_gated_ffn, tensors_of(device, shape), torch.float32)


@each_kernel("gated_ffn")
@pytest.mark.parametrize(
    "shape",
    [(1, 36, 7, 41), (1, 48, 3, 9), (1, 64, 3, 5), (3, 1, 1, 1), (2, 17, 1, 33), (1, 5, 70, 1), (1, 3, 150, 70)],
    ids=str,
)
def test_sizes(backend, device, shape):
    for dtype in (torch.float32,) if shape[1] > 36 else (torch.float32, torch.bfloat16):
        assert_within_yardstick(backend, gated_ffn, naive_gated_ffn, tensors_of(device, shape), dtype)


@each_kernel("gated_ffn", dtype=torch.float64)
@each_layout
def test_strides(backend, device, layout):
    """In float32, where test_layouts is in float64."""
    tensors = tensors_of(device, (2, 5, 6, 7))
    assert_within_yardstick(backend, gated_ffn, naive_gated_ffn, tensors, torch.float32, layout)


@each_kernel("gated_ffn")
def test_images_do_not_see_each_other(backend, device):
    """Nor does the first row of an image see the last one of that before: NaN stays where it is."""
    tensors = float_tensors(device, (3, 4, 5, 6))
    tensors["x"][1] = torch.nan
    with running_on(backend, device):
        found = value_and_gradients(gated_ffn, tensors)
        others = value_and_gradients(gated_ffn, tensors | {"x": tensors["x"][::2]})
    assert torch.equal(found["y"][::2], others["y"])
    assert found["y"][1].isnan().all() and found["gradient of x"][1].isnan().all()
    assert not found["gradient of x"][::2].isnan().any()


@each_kernel("gated_ffn")
def test_no_images(backend, device):
    with running_on(backend, device):
        found = value_and_gradients(gated_ffn, float_tensors(device, (0, 3, 4, 5)))
    assert found.pop("y").shape == found.pop("gradient of x").shape == (0, 3, 4, 5)
    assert not any(gradient.any() for gradient in found.values())


@each_kernel("gated_ffn")
def test_operator(backend, device):
    tensors = float_tensors(device)
    with running_on(backend, device):
        assert_operator(gated_ffn, tensors, {"eps": 1e-6})
        assert_compiles(gated_ffn, tensors, float_tensors(device, (3, 3, 9, 5)))


@each_kernel("gated_ffn")
def test_offsets_beyond_31_bits(backend, device):
    with running_on(backend, device):
        assert_large_offsets(gated_ffn, float_tensors(device, dtype=torch.bfloat16), ["x"])


@each_kernel("gated_ffn")
def test_under_autocast(backend, device):
    """x stays float32 where it is normalised and where it is added: a mean that dwarfs the deviations does no harm."""
    tensors = float_tensors(device, (2, 36, 6, 7))
    tensors["x"] += 1000
    exact = naive_gated_ffn(**cast(tensors, torch.float64))
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        found = value_and_gradients(gated_ffn, tensors)
    assert {value.dtype for value in found.values()} == {torch.float32}
    change = exact - tensors["x"]
    assert largest_difference(found["y"] - tensors["x"], change) < 2**-5 * change.abs().max()

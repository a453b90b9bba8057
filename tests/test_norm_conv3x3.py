"""norm_conv3x3: LayerNorm (or none), dense 3x3 convolution, GELU (or not), 1x1 convolution (or none)."""

import itertools

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_norm_conv3x3
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
    largest_difference,
    norm_shapes,
    random_parameters,
    value_and_gradients,
)

from seemore_fast import reference
from seemore_fast.ops import norm_conv3x3

each_option = pytest.mark.parametrize(
    "norm, pointwise, activation", list(itertools.product([1, 0], [1, 0], ["gelu", None]))
)


def case_of(device, shape=(2, 3, 6, 7), norm=True, pointwise=True, activation="gelu", middle=5, out=4):
    """Return the tensors that there are, and the options: those that are None, and the activation."""
    shapes = {"x": shape}
    options = {"activation": activation}
    if norm:
        shapes |= norm_shapes(shape[1])
    else:
        options |= {"norm_weight": None, "norm_bias": None}
    shapes |= {"weight": (middle, shape[1], 3, 3), "bias": (middle,)}
    if pointwise:
        shapes |= {"weight_pw": (out, middle, 1, 1), "bias_pw": (out,)}
    return random_parameters(shapes, device), options


@each_backend("norm_conv3x3")
@each_shape
@each_option
def test_values(backend, device, shape, norm, pointwise, activation):
    tensors, options = case_of(device, shape, norm, pointwise, activation, shape[1], 2 * shape[1])
    assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, **options)


@each_backend("norm_conv3x3")
@pytest.mark.parametrize("middle, out", [(1, 1), (7, 2), (2, 19)])
def test_numbers_of_channels(backend, device, middle, out):
    tensors, options = case_of(device, middle=middle, out=out)
    assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, **options)


@each_backend("norm_conv3x3")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(backend, device, eps):
    tensors, options = case_of(device)
    assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, eps=eps, **options)


@each_backend("norm_conv3x3")
def test_border_sees_zeros_after_the_norm(backend, device):
    """LN of one channel is its bias, 1: a sum over 3x3 of it counts the taps inside of the image."""
    one = torch.ones(1, dtype=backend.widest, device=device)
    x, weight = one.expand(1, 1, 3, 3), one.expand(1, 1, 3, 3)
    with running_on(backend, device):
        y = norm_conv3x3(x, one, one, weight, 0 * one)
    assert y.tolist() == [[[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]]


@each_backend("norm_conv3x3")
@each_layout
@each_option
def test_layouts(backend, device, layout, norm, pointwise, activation):
    tensors, options = case_of(device, norm=norm, pointwise=pointwise, activation=activation)
    assert_close_to_naive(backend, norm_conv3x3, naive_norm_conv3x3, tensors, layout, **options)


@each_backend("norm_conv3x3")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    tensors, options = case_of(device, (2, 8, 9, 11), middle=8, out=16)
    tensors["x"] *= spread
    assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, dtype, layout, **options)


@each_backend("norm_conv3x3", dtype=torch.float64)
@each_option
def test_gradcheck(backend, device, norm, pointwise, activation):
    tensors, options = case_of(device, (2, 3, 2, 3), norm, pointwise, activation, middle=2, out=3)
    with running_on(backend, device):
        assert_gradcheck(norm_conv3x3, tensors, **options)


@each_backend("norm_conv3x3", dtype=torch.float64)
@pytest.mark.parametrize("norm, pointwise", [(True, True), (False, False)])
def test_compiles(backend, device, norm, pointwise):
    (small, options), (other, _) = (case_of(device, shape, norm, pointwise) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with running_on(backend, device):
        assert_compiles(norm_conv3x3, small, other, **options)


@each_fault
def test_bad_tensors(device, fault):
    tensors, options = case_of(device)
    exempt = ["norm_weight", "norm_bias", "weight_pw", "bias_pw"] if fault == "none" else []
    assert_refused(fault, norm_conv3x3, tensors, exempt, **options)


def test_bad_sizes(device):
    tensors, options = case_of(device)
    assert_sizes_refused(norm_conv3x3, tensors, free=BATCH_AND_PIXELS, **options)


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


# Kernels, which float32, float16 and bfloat16 have


def float_tensors(device, *size, dtype=torch.float32, **options):
    tensors, options = case_of(device, *size, **options)
    return cast(tensors, dtype), options


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize(
    "shape, norm, pointwise, activation, middle, out",
    [
        ((1, 36, 5, 17), True, True, "gelu", 36, 72),  # more than one tile of pixels
        ((1, 36, 3, 4), True, False, None, 36, 0),
        ((1, 48, 2, 5), True, True, "gelu", 48, 96),
        ((1, 64, 3, 7), False, True, "gelu", 64, 128),
        ((2, 8, 1, 4), False, False, "gelu", 48, 0),
        ((3, 1, 1, 1), True, True, "gelu", 1, 1),
        ((2, 5, 1, 33), False, True, None, 10, 3),
        ((1, 5, 70, 1), True, True, "gelu", 1, 31),
        ((2, 17, 2, 3), False, False, None, 5, 0),
    ],
    ids=str,
)
def test_sizes(backend, device, shape, norm, pointwise, activation, middle, out):
    tensors, options = case_of(device, shape, norm, pointwise, activation, middle, out)
    for dtype in (torch.float32,) if shape[1] > 36 else (torch.float32, torch.bfloat16):
        assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, dtype, **options)


@each_kernel("norm_conv3x3", dtype=torch.float64)
@each_layout
@pytest.mark.parametrize("norm", [True, False])
def test_strides(backend, device, layout, norm):
    """In float32, where test_layouts is in float64."""
    tensors, options = case_of(device, (2, 5, 6, 7), norm)
    assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, torch.float32, layout, **options)


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 1, 3, 4), (2, 4, 1, 5), (2, 4, 5, 1), (1, 1, 1, 1)], ids=str)
def test_packed_images_are_read_where_they_are(backend, device, shape):
    """Strides of sizes of 1 do not matter, but those of others do: a slice of a packed image has gaps."""
    from seemore_fast.backends.planes import new_packed
    from seemore_fast.kernels.windows import is_packed

    larger = new_packed(torch.empty(shape), shape[1] + 1)
    assert is_packed(larger) and is_packed(larger[::2]) and is_packed(larger[:, :, :1])
    assert is_packed(larger[:, 1:]) == (shape[2:] == (1, 1))
    assert is_packed(torch.empty(shape)) == (shape[1] == 1 or shape[2:] == (1, 1))
    tensors, options = case_of(device, shape, norm=False)
    assert_within_yardstick(
        backend, norm_conv3x3, naive_norm_conv3x3, tensors, torch.float32, "channels_last", **options
    )


@each_kernel("norm_conv3x3")
def test_large_offset_of_the_mean(backend, device):
    """The mean is subtracted before anything is squared or rounded."""
    tensors, options = case_of(device, (1, 36, 5, 6), pointwise=False)
    tensors["x"] += 1000
    assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, torch.float32, **options)


@each_kernel("norm_conv3x3")
def test_programs_of_more_than_one_tile_add_up(backend, device, monkeypatch):
    products = pytest.importorskip("seemore_fast.kernels.products")
    monkeypatch.setattr(products, "PARTS", 2)
    tensors, options = case_of(device, (1, 5, 20, 19))
    assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, torch.float32, **options)


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize("pointwise", [True, False])
def test_no_images(backend, device, pointwise):
    tensors, options = float_tensors(device, (0, 3, 4, 5), pointwise=pointwise)
    with running_on(backend, device):
        found = value_and_gradients(norm_conv3x3, tensors, **options)
    assert found["y"].shape == (0, 4 if pointwise else 5, 4, 5)
    assert not any(found[f"gradient of {name}"].any() for name in tensors)


@each_kernel("norm_conv3x3")
@pytest.mark.falls_back("triton", reason="up to 64 channels")
@pytest.mark.parametrize("wide", [{"shape": (1, 65, 2, 3)}, {"middle": 65}, {"out": 129}], ids=str)
def test_wide_models(backend, device, wide):
    """Triton's kernels leave them to the reference; the CPU's take any number of channels."""
    tensors, options = float_tensors(device, **wide)
    with running_on(backend, device):
        y = norm_conv3x3(**tensors, **options)
    expected = reference.norm_conv3x3(**tensors, **options)
    if backend.startswith("cpu"):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(y, expected)


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize("norm, pointwise", [(True, True), (False, False)])
def test_operator(backend, device, norm, pointwise):
    (tensors, options), (other, _) = (
        float_tensors(device, shape, norm, pointwise) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)]
    )
    with running_on(backend, device):
        assert_operator(norm_conv3x3, tensors, {"eps": 1e-6}, **options)
        assert_compiles(norm_conv3x3, tensors, other, **options)


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize("norm", [True, False])
def test_offsets_beyond_31_bits(backend, device, norm):
    tensors, options = float_tensors(device, norm=norm, dtype=torch.bfloat16)
    with running_on(backend, device):
        assert_large_offsets(norm_conv3x3, tensors, ["x"], **options)


@each_kernel("norm_conv3x3")
def test_under_autocast(backend, device):
    """x is normalised in float32 and only then rounded; without a norm it is rounded itself."""
    tensors, options = float_tensors(device, (2, 36, 6, 7), pointwise=False, activation=None)
    tensors["x"] += 1000
    exact = naive_norm_conv3x3(**cast(tensors, torch.float64), **options)
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm")}
    without = options | {"norm_weight": None, "norm_bias": None}
    with running_on(backend, device):
        narrow = norm_conv3x3(**cast(plain, torch.bfloat16), **without)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = value_and_gradients(norm_conv3x3, tensors, **options)
            assert torch.equal(norm_conv3x3(**plain, **without), narrow)
    assert found["y"].dtype == torch.bfloat16
    assert found["gradient of x"].dtype == found["gradient of weight"].dtype == torch.float32
    assert largest_difference(found["y"], exact) < 2**-6 * exact.abs().max()


@each_kernel("norm_conv3x3")
@pytest.mark.parametrize("shape", [(1, 4, 40, 40), (2, 3, 51, 33)], ids=str)
def test_many_lines(backend, device, shape):
    """More lines than a kernel takes at a time: what a step leaves for the next one."""
    if backend == "triton":
        pytest.skip("slow in the interpreter, and its kernels take tiles")
    tensors, options = case_of(device, shape)
    assert_within_yardstick(backend, norm_conv3x3, naive_norm_conv3x3, tensors, torch.float32, **options)

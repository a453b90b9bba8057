"""striped_conv: depthwise 1xK, then Kx1."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, kernels_of, running_on
from helpers.faults import assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_gelu, naive_striped_conv
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
    striped_shapes,
    value_and_gradients,
)

from seemore_fast import reference
from seemore_fast.ops import striped_conv

each_option = pytest.mark.parametrize(
    "activation, gated", [(None, False), ("gelu", False), (None, True), ("gelu", True)]
)


def tensors_of(device, shape=(2, 3, 6, 7), taps=7, gated=True):
    images = {"x": shape, "gate": shape} if gated else {"x": shape}
    return random_parameters(images | striped_shapes(shape[1], taps), device)


@each_backend("striped_conv")
@each_shape
@pytest.mark.parametrize("taps", [1, 3, 7, 11, 31])
def test_values(backend, device, shape, taps):
    tensors = tensors_of(device, shape, taps)
    assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors, activation="gelu")


@each_kernel("striped_conv", interpreted=False)
@pytest.mark.parametrize(
    "shape, layout", [((1, 1, 530, 3), None), ((1, 1, 2, 1060), None), ((1, 70, 3, 150), "channels_last")]
)
def test_more_than_one_tile(backend, device, shape, layout):
    """Bands of 256 lines, columns of 1024 (64 where channels lie side by side), 64 channels: the CPU's tiles."""
    assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors_of(device, shape, 7), layout)


@each_kernel("striped_conv", interpreted=False)
@pytest.mark.parametrize("taps", [3, 7, 11])
@pytest.mark.parametrize(
    "shape, dtype, activation, gated",
    [
        ((2, 3, 90, 260), torch.float32, "gelu", True),
        ((1, 2, 64, 128), torch.float32, None, False),
        ((1, 3, 83, 129), torch.bfloat16, None, True),
        ((3, 1, 41, 64), torch.float16, "gelu", False),
        ((1, 2, 130, 348), torch.bfloat16, "gelu", True),
        ((3, 3, 20, 12), torch.float32, None, True),
    ],
    ids=str,
)
def test_more_than_one_strip(backend, device, shape, dtype, activation, gated, taps):
    """CUDA's: of 64 or 128 columns, neighbours to the right and below, widths of quads and not, two a warp."""
    tensors = tensors_of(device, shape, taps, gated)
    assert_within_yardstick(backend, striped_conv, naive_striped_conv, tensors, dtype, activation=activation)


@pytest.mark.parametrize("backend", [name for name in kernels_of("striped_conv", False) if name.startswith("cuda")])
@each_narrow_dtype
@pytest.mark.parametrize("activation, gated", [(None, False), ("gelu", True)])
@pytest.mark.parametrize("width", [15, 16])
@pytest.mark.parametrize("taps", [3, 7, 11])
def test_every_instantiation(backend, device, dtype, taps, width, activation, gated):
    """CUDA's kernels differ by dtype, taps, rows that are quads or not, and whether the gradient of s is stored."""
    tensors = tensors_of(device, (2, 2, 23, width), taps, gated)
    assert_within_yardstick(backend, striped_conv, naive_striped_conv, tensors, dtype, activation=activation)


@each_backend("striped_conv")
@each_option
def test_options(backend, device, activation, gated):
    tensors = tensors_of(device, gated=gated)
    assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors, activation=activation)


@each_backend("striped_conv")
def test_pixels_outside_are_zero_in_both_steps(backend, device):
    """One pixel of 0, bias_row 1, all taps 1: the column step sees bias_row once, zeros above and below."""
    ones = torch.ones(1, 1, 1, 3, dtype=torch.float64, device=device)
    one, zero = ones[0, 0, 0, :1], ones.new_zeros(1)
    with running_on(backend, device):
        y = striped_conv(zero[None, None, None], ones, one, ones.transpose(2, 3), zero)
    assert y.tolist() == [[[[1.0]]]]


@each_backend("striped_conv")
@each_layout
@each_option
def test_layouts(backend, device, layout, activation, gated):
    tensors = tensors_of(device, gated=gated)
    assert_close_to_naive(backend, striped_conv, naive_striped_conv, tensors, layout, activation=activation)


@each_backend("striped_conv")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("taps", [3, 11])
def test_narrow_dtypes(backend, device, dtype, layout, taps):
    tensors = tensors_of(device, (2, 8, 17, 19), taps)
    assert_within_yardstick(backend, striped_conv, naive_striped_conv, tensors, dtype, layout, activation="gelu")


@each_backend("striped_conv", interpreted=False, dtype=torch.float64)
@each_option
def test_gradcheck(backend, device, activation, gated):
    tensors = tensors_of(device, (2, 2, 3, 4), gated=gated)
    with running_on(backend, device):
        assert_gradcheck(striped_conv, tensors, activation=activation)


@each_backend("striped_conv")
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(striped_conv, tensors_of(device), tensors_of(device, (3, 3, 9, 5)), activation="gelu")


@each_kernel("striped_conv")
@each_option
def test_opcheck(backend, device, activation, gated):
    with running_on(backend, device):
        assert_opcheck(striped_conv, tensors_of(device, gated=gated), activation=activation)
        channels_last = {name: LAYOUTS["channels_last"](t) for name, t in tensors_of(device, gated=gated).items()}
        assert_opcheck(striped_conv, channels_last, activation=activation)


@each_kernel("striped_conv")
@each_option
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_writes_its_results_only(backend, device, activation, gated, layout):
    tensors = tensors_of(device, (2, 9, 13, 19), 11, gated)
    if layout:
        tensors = {name: LAYOUTS[layout](t) for name, t in tensors.items()}
    with running_on(backend, device):
        assert_writes_its_results_only(striped_conv, tensors, activation=activation)


@each_backend("striped_conv")
def test_large_offsets(backend, device):
    tensors = cast(tensors_of(device, (2, 2, 3, 5), 3), torch.bfloat16)
    with running_on(backend, device):
        assert_large_offsets(striped_conv, tensors, ["x", "gate"], activation="gelu")


@each_kernel("striped_conv", interpreted=False)
def test_deterministic(backend, device):
    tensors = cast(tensors_of(device, (2, 3, 70, 40), 11), torch.float32)
    with running_on(backend, device):
        assert_deterministic(striped_conv, tensors, activation="gelu")


@each_kernel("striped_conv", interpreted=False)
def test_gelu_and_its_gradient_everywhere(backend, device):
    x = torch.linspace(-15, 15, 60_001, device=device)
    one, zero = torch.tensor([[[[0.0, 1, 0]]]], device=device), torch.zeros(1, device=device)
    image = x.view(1, 1, 1, -1).requires_grad_()
    with running_on(backend, device):
        y = striped_conv(image, one, zero, one.transpose(2, 3), zero, activation="gelu")
        (gradient,) = torch.autograd.grad(y.sum(), image)
    exact = x.double().requires_grad_()
    expected = naive_gelu(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(y.flatten().double(), expected.detach(), rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(gradient.flatten().double(), expected_gradient, rtol=2e-7, atol=5e-7)


@each_kernel("striped_conv", interpreted=False)
@pytest.mark.parametrize("taps, width", [(3, 13), (11, 64), (7, 9), (5, 20)])
def test_images_are_alone(backend, device, taps, width):
    """Also where a thread goes on from one image to the next with the same buffers."""
    tensors = cast(tensors_of(device, (3, 2, 14, width), taps), torch.float32)
    with running_on(backend, device):
        assert_images_are_alone(striped_conv, tensors, activation="gelu")


@each_kernel("striped_conv", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [3, 7, 11])
@pytest.mark.parametrize("width", [16, 48, 61, 64])
def test_slices_of_channels(backend, device, dtype, taps, width):
    """Chunks of one tensor: rows of whole vectors may be read where they are."""
    tensors = tensors_of(device, (2, 3, 21, width), taps)
    x, gate = torch.cat([tensors["x"], tensors["gate"]], dim=1).chunk(2, dim=1)
    tensors |= {"x": x, "gate": gate}
    assert_within_yardstick(backend, striped_conv, naive_striped_conv, tensors, dtype, activation="gelu")


@each_backend("striped_conv")
def test_double_backward(backend, device):
    tensors = tensors_of(device)
    with running_on(backend, device):
        if backend == "reference":
            assert torch.autograd.gradgradcheck(
                lambda x: striped_conv(**tensors | {"x": x}), tensors["x"].requires_grad_()
            )
        else:
            assert_refuses_double_backward(striped_conv, tensors)


@each_backend("striped_conv")
def test_autocast(backend, device):
    """All inputs are cast, as for torch's convolutions, but float64 ones; gradients have their own dtypes."""
    tensors = cast(tensors_of(device), torch.float32)
    with running_on(backend, device):
        narrow = striped_conv(**cast(tensors, torch.bfloat16), activation="gelu")
        with torch.autocast(device, torch.bfloat16):
            found = value_and_gradients(striped_conv, tensors, activation="gelu")
            with pytest.raises(
                TypeError, match=r"^striped_conv: weight_row has dtype torch.bfloat16, expected torch.float64"
            ):
                striped_conv(**tensors | {"x": tensors["x"].double()})
    assert torch.equal(found["y"], narrow)
    assert all(value.dtype == torch.float32 for what, value in found.items() if what != "y")


@each_kernel("striped_conv")
def test_extreme_values(backend, device, monkeypatch):
    """Infinities and NaN come out where the formula has them."""
    tensors = cast(tensors_of(device, (1, 1, 5, 40), 3), torch.float32)
    for column, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30)):
        tensors["x"][0, 0, 2, 6 * column] = value
    with running_on(backend, device):
        y = striped_conv(**tensors, activation="gelu")
    # torch's own GELU of infinity is infinity or NaN, as the processor has it
    monkeypatch.setattr(torch.nn.functional, "gelu", naive_gelu)
    expected = reference.striped_conv(**tensors, activation="gelu")
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@each_fault
def test_bad_tensors(device, fault):
    exempt = ["gate"] if fault == "none" else []
    assert_refused(fault, striped_conv, tensors_of(device), exempt)


def test_bad_sizes(device):
    assert_sizes_refused(striped_conv, tensors_of(device))


def test_another_device_is_refused(device):
    tensors = tensors_of(device)
    tensors["gate"] = tensors["gate"].to("meta")
    with pytest.raises(ValueError, match=f"^striped_conv: gate is on meta, expected {device}.*, where x is"):
        striped_conv(**tensors)


@pytest.mark.parametrize("taps", [0, 2, 4])
def test_even_kernels_are_refused(device, taps):
    with pytest.raises(ValueError, match=f"^striped_conv: weight_row has {taps} taps, expected an odd number"):
        striped_conv(**tensors_of(device, taps=taps))


@pytest.mark.parametrize("activation", ["relu", "GELU", "", False])
def test_unknown_activations_are_refused(device, activation):
    with pytest.raises(ValueError, match=r"^striped_conv: activation is .*, expected one of None, 'gelu'"):
        striped_conv(**tensors_of(device), activation=activation)

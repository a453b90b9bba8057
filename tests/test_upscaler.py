"""Upscaler on arrays and Pillow images of every kind."""

import copy

import numpy as np
import pytest
import torch
from helpers.images import max_value, noise
from helpers.networks import SMALL
from PIL import Image

from seemore_fast import SeemoRe, Upscaler, backends
from seemore_fast.io.resize import bicubic_bands, bicubic_resize
from seemore_fast.network import engine


@pytest.fixture(scope="module")
def model(device):
    torch.manual_seed(0)
    return SeemoRe(**SMALL).to(device).eval()


@pytest.fixture(scope="module")
def upscaler(model):
    return Upscaler(model, device="cpu")


def through_network(model, colours):
    """Return float64 (2H, 2W, 3) of the network on float (H, W, 3), computed here."""
    x = torch.from_numpy(colours.astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return model(x.to(model.mean.device))[0].permute(1, 2, 0).cpu().double().numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,), (4,)])
def test_arrays_keep_their_kind_and_are_right(model, upscaler, dtype, channels):
    image = noise(18, 21, *channels, dtype=dtype)
    result, top = upscaler(image), max_value(dtype)
    assert result.dtype == dtype and result.shape == (36, 42, *channels)
    planes = image.reshape(18, 21, -1).astype(np.float64) / top
    has_alpha = planes.shape[2] in (2, 4)
    colours = planes[:, :, :-1] if has_alpha else planes
    expected = through_network(model, colours * np.ones(3))
    if colours.shape[2] == 1:
        expected = (expected @ [0.299, 0.587, 0.114])[:, :, None]
    if has_alpha:
        expected = np.dstack([expected, bicubic_resize(planes[:, :, -1], 2)])
    tolerance = {np.uint8: 0.51 / 255, np.uint16: 0.6 / 65535, np.float16: 1e-3}.get(dtype, 1e-5)
    np.testing.assert_allclose(result.reshape(36, 42, -1) / top, expected.clip(0, 1), atol=tolerance + 1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "1", "P", "CMYK", "YCbCr"])
def test_pillow_modes(upscaler, mode):
    image = Image.fromarray(noise(16, 20, 4 if "A" in mode else 3)).convert(mode)
    result, expected = upscaler(image), {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}.get(mode, mode)
    assert result.mode == expected and result.size == (40, 32)
    if mode == expected:
        np.testing.assert_array_equal(np.asarray(result), upscaler(np.asarray(image)))


def test_transparency_of_a_palette_and_opaque_alpha_are_kept(upscaler):
    image = Image.fromarray(noise(16, 16, 3)).quantize(8)
    image.info["transparency"] = 0
    result = upscaler(image)
    assert result.mode == "RGBA" and np.asarray(result)[:, :, 3].min() == 0
    opaque = noise(16, 16, 4)
    opaque[:, :, 3] = 255
    assert (upscaler(opaque)[:, :, 3] == 255).all()


def test_one_channel_models_take_colour_plane_by_plane(device):
    upscaler = Upscaler(SeemoRe(**{**SMALL, "in_chans": 1}), device=device)
    image = noise(16, 18, 3)
    planes = [upscaler(np.ascontiguousarray(image[:, :, c])) for c in range(3)]
    np.testing.assert_allclose(upscaler(image).astype(int), np.dstack(planes).astype(int), atol=1)


needs_engine = pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")


@needs_engine
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("shape", [(18, 21, 3), (40, 33, 4), (5, 30, 3), (1, 1, 3)])
def test_integers_go_straight_through_the_engine_and_equal_the_rounded_floats(monkeypatch, shape, in_chans, dtype):
    upscaler = Upscaler(SeemoRe(**{**SMALL, "in_chans": in_chans}), device="cpu")
    image = noise(*shape, dtype=dtype)
    run, seen = engine.run_out, []
    monkeypatch.setattr(engine, "run_out", lambda model, x, *more, **o: seen.append(x) or run(model, x, *more, **o))
    result, top = upscaler(image), max_value(dtype)
    assert [x.data_ptr() for x in seen] == [image.ctypes.data], "without a copy"
    exact = upscaler((image / top).astype(np.float32)).astype(np.float64)
    np.testing.assert_array_equal(result[:, :, :3], np.rint((exact * top).astype(np.float32))[:, :, :3])


@pytest.mark.parametrize("kind", ["read-only", "every other", "flipped", "field", "broadcast", "transposed"])
def test_views_are_read_and_not_changed(upscaler, kind):
    base = noise(20, 24, 3)
    image = {
        "every other": base[::2, ::-2],
        "flipped": base[::-1, :, ::-1],
        "field": np.rec.fromarrays([base, noise(20, 24, 3, dtype=np.uint16)])["f1"],
        "broadcast": np.broadcast_to(base[:1], base.shape),
        "transposed": base.transpose(1, 0, 2),
    }.get(kind, base)
    assert kind != "field" or image.strides[2] % image.itemsize
    base.flags.writeable = kind != "read-only"
    before = base.copy()
    np.testing.assert_array_equal(upscaler(image), upscaler(np.array(image, order="C")))
    np.testing.assert_array_equal(base, before)


@needs_engine
def test_the_weights_are_packed_once(monkeypatch, small_model):
    upscaler = Upscaler(small_model, device="cpu")
    monkeypatch.setattr(engine, "pack", None)
    for dtype in (np.uint8, np.float32):
        upscaler(noise(16, 16, 3, dtype=dtype))


@needs_engine
@pytest.mark.parametrize("dtype, channels", [(np.uint8, ()), (np.uint16, (3,)), (np.float32, (4,))])
def test_images_that_do_not_fit_are_refused_before_anything_is_allocated(upscaler, dtype, channels):
    image = np.broadcast_to(np.zeros((1, *channels), dtype), (10**5, 10**5, *channels))
    text = r"^2x upscaling of 100000x100000 pixels needs [\d,.]+ GiB \([\d,]+ bytes\) .*smaller image"
    with pytest.raises(MemoryError, match=text):
        upscaler(image)


def test_the_given_module_stays_unchanged(small_model):
    small_model.train()
    weights = copy.deepcopy(small_model.state_dict())
    upscaler = Upscaler(small_model, device="cpu", dtype="bf16")
    upscaler(noise(16, 16, 3))
    assert small_model.training and all(p.requires_grad for p in small_model.parameters())
    torch.testing.assert_close(small_model.state_dict(), weights, rtol=0, atol=0)
    assert upscaler.model.conv_2.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16, "fp16", torch.float16])
def test_reduced_precision_differs_by_little(model, upscaler, dtype):
    image = noise(32, 32, 3)
    result = Upscaler(model, device="cpu", dtype=dtype)(image)
    assert np.abs(result.astype(int) - upscaler(image).astype(int)).max() <= 4


def test_nan_results_are_refused(small_model):
    with torch.no_grad():
        small_model.conv_2.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN"):
        Upscaler(small_model, device="cpu")(noise(16, 16, 3))


def test_other_byte_orders_are_supported(upscaler):
    image = noise(16, 16, 3, dtype=np.uint16)
    result = upscaler(image.astype(">u2"))
    assert result.dtype == np.dtype(">u2")
    np.testing.assert_array_equal(result, upscaler(image))


def test_shipped_names_with_and_without_scale():
    for given in ({}, {"model": "seemore_t", "scale": 2}, {"model": "seemore_t_x2"}):
        assert Upscaler(**given, device="cpu").scale == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(model="seemore_q"), ValueError, "no shipped model 'seemore_q'"),
        (dict(model="seemore_t", scale=5), ValueError, "no shipped model 'seemore_t_x5'.*seemore_t_x2"),
        (dict(model="seemore_t_x2", scale=3), ValueError, "has scale 2, expected 3"),
        (dict(device="gpu"), ValueError, "device is 'gpu'"),
        (dict(dtype="int8"), ValueError, "dtype is 'int8'"),
        (dict(dtype=torch.int32), ValueError, "dtype is torch.int32"),
        (dict(device="meta"), ValueError, "device is 'meta'"),
        (dict(device="xpu"), ValueError, "device is 'xpu'"),
        (dict(scale="2"), ValueError, "scale is '2'"),
        (dict(model=3), TypeError, "is a int"),
        (dict(alpha="none"), ValueError, "alpha is 'none', expected bicubic or network"),
        (dict(progress=3), ValueError, "progress is 3, expected a function"),
        (dict(model="none.pth"), FileNotFoundError, "none.pth does not exist"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Upscaler(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda():
    with pytest.raises(ValueError, match=r"'cuda'.*no CUDA device.*'cpu'"):
        Upscaler(device="cuda")


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"shape \(4, 4, 5\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"shape \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "dtype int64"),
        (Image.new("I", (4, 4)), ValueError, "mode I.*uint16"),
        (torch.zeros(3, 4, 4), TypeError, "is a Tensor"),
        ("photo.png", TypeError, "is a str"),
    ],
)
def test_bad_images(upscaler, image, error, message):
    with pytest.raises(error, match=message):
        upscaler(image)


# Other sizes, test-time augmentation, alpha


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 4)])
def test_another_size_is_resampled_from_the_networks_result(upscaler, dtype, shape):
    image = noise(*shape, dtype=dtype)
    result, top = upscaler(image, outscale=1.7), max_value(dtype)
    assert result.shape == (34, 51, *shape[2:]) and result.dtype == dtype

    def resized(values):
        return np.concatenate([rows for _, rows in bicubic_bands(values, 34, 51)])

    expected = resized(upscaler(image).reshape(40, 60, -1) / top)
    if len(shape) == 3:  # alpha without the network
        expected[:, :, 3] = resized(image[:, :, 3] / top)
    found = result.reshape(34, 51, -1) / top
    np.testing.assert_allclose(found, expected.clip(0, 1), atol=0.51 / top if top > 1 else 1e-6)


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        (dict(width=45), (30, 45)),
        (dict(height=50), (50, 75)),
        (dict(width=11, height=77), (77, 11)),
        (dict(outscale=0.01), (1, 1)),
        (dict(outscale=2), (40, 60)),
        (dict(outscale=5.5), (110, 165)),
        (dict(), (40, 60)),
    ],
)
def test_sizes(upscaler, wanted, size):
    assert upscaler(noise(20, 30, 3), **wanted).shape == (*size, 3)
    assert upscaler(Image.fromarray(noise(20, 30, 3)), **wanted).size == size[::-1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (dict(outscale=0), "outscale is 0, expected a positive number"),
        (dict(outscale=float("nan")), "outscale is nan"),
        (dict(width=-3), "width is -3"),
        (dict(outscale=2, height=3), "outscale is given with width or height"),
        (dict(width=45.5), "width is 45.5, expected an integer"),
        (dict(height="45"), "height is '45', expected an integer"),
        (dict(outscale="2"), "outscale is '2', expected a number"),
        (dict(outscale=True), "outscale is True, expected a number"),
    ],
)
def test_bad_sizes(upscaler, wanted, message):
    with pytest.raises((TypeError, ValueError), match=message):
        upscaler(noise(20, 30, 3), **wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_tta_is_the_mean_over_eight_orientations(model, upscaler, dtype, channels):
    image = noise(17, 24, *channels, dtype=dtype)
    top = max_value(dtype)
    unit, parts = (image / top).astype(np.float32), []
    for transpose in (False, True):
        for flips in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            turned = unit[:: flips[0], :: flips[1]]
            turned = turned.swapaxes(0, 1) if transpose else turned
            result = upscaler(np.ascontiguousarray(turned))
            result = result.swapaxes(0, 1) if transpose else result
            parts.append(result[:: flips[0], :: flips[1]])
    assert len({part.tobytes() for part in parts}) == 8
    result = Upscaler(model, device="cpu", tta=True)(image)
    assert result.dtype == dtype and result.shape == (34, 48, *channels)
    np.testing.assert_allclose(result / top, np.mean(parts, axis=0), atol=0.51 / top if top > 1 else 1e-6)


def test_alpha_by_the_network_on_request(model, upscaler):
    image = noise(20, 24, 4)
    result = Upscaler(model, device="cpu", alpha="network")(image)
    np.testing.assert_array_equal(result[:, :, 3], upscaler(np.ascontiguousarray(image[:, :, 3])))
    np.testing.assert_array_equal(result[:, :, :3], upscaler(image)[:, :, :3])

"""PNG and TIFF files of 16 bits a channel: every bit of them in, every bit of the network's out."""

import os
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from seemore_fast import Upscaler
from seemore_fast.errors import ImageError
from seemore_fast.io import png16 as deep
from seemore_fast.io.images import Picture, read_image, write_image

pyvips = pytest.importorskip("pyvips")
ORIENTATION, MAKE = 0x0112, 0x010F


def deep_pixels(channels, height=16, width=20):
    """Return values whose low bytes tell, with both ends of the range."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    made = np.random.default_rng(zlib.crc32(repr(shape).encode())).integers(0, 65536, shape, np.uint16)
    made.flat[:2] = 0, 65535
    return made


def save(array, path, **options):
    """Write an array by libvips itself, whose writers are not ours."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    image = pyvips.Image.new_from_array(array, interpretation="rgb16" if channels > 2 else "grey16")
    image.write_to_file(str(path), **options)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_bit_arrives_and_leaves(photos, upscale, weights, channels, suffix):
    array = deep_pixels(channels)
    save(array, photos / f"deep{suffix}")
    np.testing.assert_array_equal(read_image(photos / f"deep{suffix}", deeper=True).image, array)
    assert upscale(photos / f"deep{suffix}", "-o", photos / f"big{suffix}")[0] == 0
    result = read_image(photos / f"big{suffix}", deeper=True).image
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, Upscaler(weights, device="cpu")(array))
    assert len(np.unique(result & 0xFF)) > 100  # no 8 bits times 257


@pytest.mark.parametrize("compression", ["none", "lzw", "deflate"])
@pytest.mark.parametrize("layout", [{}, {"tile": True}])
def test_tiffs_of_other_makes(photos, compression, layout):
    array = deep_pixels(3, 70, 90)
    save(array, photos / "deep.tif", compression=compression, **layout)
    np.testing.assert_array_equal(read_image(photos / "deep.tif", deeper=True).image, array)


def test_both_byte_orders(photos):
    array = deep_pixels(1)
    for order in "<>":
        Image.frombytes("I;16" if order == "<" else "I;16B", (20, 16), array.astype(f"{order}u2").tobytes()).save(
            photos / "grey.tif"
        )
        np.testing.assert_array_equal(read_image(photos / "grey.tif", deeper=True).image, array)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats_of_8_bits_get_rounded_ones_with_a_word(photos, upscale, weights, channels, suffix):
    array = deep_pixels(channels)
    save(array, photos / "deep.png")
    status, printed = upscale(photos / "deep.png", "-o", photos / f"big{suffix}")
    assert status == 0
    assert "deep.png: its 16 bits a channel were rounded to 8" in printed
    rounded = np.rint(Upscaler(weights, device="cpu")(array) / 257).astype(np.uint8)
    write_image(Picture(Image.fromarray(rounded)), photos / f"rounded{suffix}")
    big, same = (np.asarray(Image.open(photos / f"{name}{suffix}")) for name in ("big", "rounded"))
    np.testing.assert_array_equal(big, same)


def test_rounding_to_8_bits_is_to_the_nearest():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(np.asarray(Picture(every).in_8_bits()), np.rint(every / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_exif_kept(photos, upscale, weights, orientation):
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE] = orientation, "Maker"
    array = deep_pixels(3)
    write_image(Picture(array, exif=exif.tobytes()), photos / "turned.png")
    upright = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1),
        6: np.rot90(array, -1), 7: array[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(array),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(read_image(photos / "turned.png", deeper=True).image, upright)
    assert upscale(photos / "turned.png", "-o", photos / "big.png")[0] == 0
    np.testing.assert_array_equal(
        read_image(photos / "big.png", deeper=True).image, Upscaler(weights, device="cpu")(upright)
    )
    with Image.open(photos / "big.png") as image:
        assert image.getexif()[MAKE] == "Maker"
        assert image.getexif().get(ORIENTATION, 1) == 1


def test_exif_that_a_tiff_does_not_get_is_told(photos, upscale):
    exif = Image.Exif()
    exif[MAKE] = "Maker"
    write_image(Picture(deep_pixels(3), exif=exif.tobytes()), photos / "made.png")
    status, printed = upscale(photos / "made.png", "-o", photos / "big.tif")
    assert status == 0
    assert "made.png: its EXIF was left out" in printed


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_profile_is_kept(photos, upscale, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_image(Picture(deep_pixels(3), icc_profile=profile), photos / f"colour{suffix}")
    assert upscale(photos / f"colour{suffix}", "-o", photos / f"big{suffix}")[0] == 0
    with Image.open(photos / f"big{suffix}") as image:
        assert image.info["icc_profile"] == profile


def test_alpha_that_hides_goes_into_no_jpeg(photos, upscale):
    save(deep_pixels(4), photos / "alpha.png")
    assert "is a JPEG, which has no alpha" in upscale(photos / "alpha.png", "-o", photos / "big.jpg")[1]
    opaque = deep_pixels(4)
    opaque[:, :, 3] = 65535
    save(opaque, photos / "opaque.png")
    assert upscale(photos / "opaque.png", "-o", photos / "big.jpg")[0] == 0


def test_premultiplied_colours_are_divided(photos):
    array = deep_pixels(4)
    array[:, :, 3] = np.maximum(array[:, :, 3], 30000)
    times = (array[:, :, :3].astype(float) * array[:, :, 3:] / 65535).round().astype(np.uint16)
    save(np.dstack([times, array[:, :, 3]]), photos / "straight.tif")
    content = (photos / "straight.tif").read_bytes()
    tag = bytes.fromhex("5201 0300 0100 0000")  # ExtraSamples, one SHORT
    assert content.count(tag + b"\2\0") == 1
    (photos / "premultiplied.tif").write_bytes(content.replace(tag + b"\2\0", tag + b"\1\0"))
    result = read_image(photos / "premultiplied.tif", deeper=True).image
    np.testing.assert_allclose(result.astype(int), array.astype(int), atol=2)


def bad_files(folder):
    """Return name -> what is said of it, and make the files."""
    save(deep_pixels(3, 200, 200), folder / "whole.png")
    save(deep_pixels(3, 200, 200), folder / "whole.tif")
    for name in ("whole.png", "whole.tif"):
        content = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) // 2])
    array = deep_pixels(4)
    pyvips.Image.new_from_array(array, interpretation="cmyk").write_to_file(str(folder / "print.tif"))
    pyvips.Image.new_from_array(array.astype(np.float32), interpretation="rgb").write_to_file(str(folder / "float.tif"))
    pyvips.Image.new_from_array(array.astype(np.uint32)).write_to_file(str(folder / "long.tif"))
    two = pyvips.Image.new_from_array(deep_pixels(2, 40, 10), interpretation="grey16").copy()
    two.set_type(pyvips.GValue.gint_type, "page-height", 20)
    two.write_to_file(str(folder / "pages.tif"))
    return {
        "cut_whole.png": "truncated or damaged",
        "cut_whole.tif": "truncated or damaged",
        "print.tif": "4 channels of type ushort, cmyk; expected 8 bits a channel, or grey or RGB of 16",
        "float.tif": "expected",
        "long.tif": "expected",
        "pages.tif": "has 2 frames or pages, expected one: split it first",
    }


def test_bad_files_are_refused(photos, upscale):
    for name, message in bad_files(photos).items():
        status, printed = upscale(photos / name, "-o", photos / "big.png")
        assert status == 1, name
        assert f"failed: {photos / name}: " in printed
        assert message in printed, printed
        assert not (photos / "big.png").exists()


def test_the_limit_on_pixels_is_for_them_too(photos):
    for channels, suffix in ((2, ".tif"), (3, ".tif"), (3, ".png")):
        save(deep_pixels(channels), photos / f"deep{suffix}")
        with pytest.raises(ImageError, match=r"has 20x16, 0.0 megapixels, over the limit of 0.0003: raise it"):
            read_image(photos / f"deep{suffix}", 0.0003, deeper=True)


def test_without_the_library_a_file_says_what_to_install(photos, upscale, monkeypatch):
    save(deep_pixels(3), photos / "deep.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    status, printed = upscale(photos / "deep.png", photos / "photo.png", "-o", photos / "out")
    assert status == 1
    assert "deep.png: needs pyvips to be read: pip install 'pyvips[binary]'" in printed
    assert (photos / "out" / "photo_x2.png").exists()


def test_names_that_are_no_text(photos, upscale):
    """libvips takes names as UTF-8, and options in brackets at their end."""
    for name in ("odd\udcff.png", "page[page=1].png"):
        save(deep_pixels(1), photos / "deep.png")
        (photos / "deep.png").rename(photos / name)
        assert upscale(photos / name, "-o", photos / f"big_{name}")[0] == 0
        assert read_image(photos / f"big_{name}", deeper=True).image.shape == (32, 40)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_fewer_bits_is_grey_of_8(photos, bits):
    levels = np.arange(20 * 16, dtype=np.uint8).reshape(20, 16) % 2**bits
    whole = (levels * (255 // (2**bits - 1))).astype(np.uint8)
    pyvips.Image.new_from_array(whole).tiffsave(str(photos / "few.tif"), bitdepth=bits)
    with Image.open(photos / "few.tif") as image:
        assert image.tag_v2[258] == (bits,)
    np.testing.assert_array_equal(np.asarray(read_image(photos / "few.tif").image), whole)


def test_evaluation_takes_8_bits_alone(photos):
    save(deep_pixels(3), photos / "deep.png")
    with pytest.raises(ImageError, match="has 16 bits a channel, expected 8: convert it"):
        read_image(photos / "deep.png")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are open")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_no_file_is_held_on_to(photos):
    """Neither one that was read, nor one that could not be written, whose room would be lost to all others."""

    def held():
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [
            path for path in map(os.readlink, filter(os.path.islink, links)) if str(photos) in path or "full" in path
        ]

    for suffix in (".png", ".tif"):
        for _ in range(3):
            save(deep_pixels(3), photos / f"deep{suffix}")
            read_image(photos / f"deep{suffix}", deeper=True)
        with pytest.raises(OSError, match="No space left"), open("/dev/full", "w+b") as full:
            deep.write_deep(deep_pixels(3, 300, 300), full, {".png": "PNG", ".tif": "TIFF"}[suffix], None, None, 1)
        with pytest.raises(ImageError):
            (photos / f"cut{suffix}").write_bytes((photos / f"deep{suffix}").read_bytes()[:500])
            read_image(photos / f"cut{suffix}", deeper=True)
    assert not held()

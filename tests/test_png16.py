"""PNG and TIFF files of 16 bits per channel, through libvips: every bit in and out."""

import os
import re
import sys

import numpy as np
import pytest
from helpers.files import assert_refused, convert, needs_vips, pixels16, pyvips, read, save, save16
from PIL import Image

from seemore_fast.errors import ImageError
from seemore_fast.io import png16
from seemore_fast.io.images import Picture, read_image, write_image

pytestmark = needs_vips


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_bit_is_read_and_written(tmp_path, channels, suffix):
    array = pixels16(channels)
    save16(array, tmp_path / f"deep{suffix}")
    convert(tmp_path / f"deep{suffix}", tmp_path / f"big{suffix}")
    for name in ("deep", "big"):
        result = read(tmp_path / f"{name}{suffix}")
        assert result.dtype == np.uint16
        np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("compression, tile", [("none", True), ("lzw", False), ("deflate", True)])
def test_tiffs_of_other_writers(tmp_path, compression, tile):
    array = pixels16(3, 70, 90)
    save16(array, tmp_path / "deep.tif", compression=compression, tile=tile)
    np.testing.assert_array_equal(read(tmp_path / "deep.tif"), array)


@pytest.mark.parametrize(("order", "mode"), [("<", "I;16"), (">", "I;16B")])
def test_both_byte_orders(tmp_path, order, mode):
    array = pixels16(1)
    Image.frombytes(mode, (20, 16), array.astype(f"{order}u2").tobytes()).save(tmp_path / "grey.tif")
    np.testing.assert_array_equal(read(tmp_path / "grey.tif"), array)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_8_bit_formats_get_rounded_values_and_a_note(tmp_path, channels, suffix):
    array = save(tmp_path / "deep.png", 16, channels)
    (note,) = convert(tmp_path / "deep.png", tmp_path / f"big{suffix}")
    assert note.startswith("its 16 bits per channel were rounded to the 8 of ")
    rounded = Image.fromarray(np.rint(array / 257).astype(np.uint8))
    write_image(Picture(rounded), tmp_path / f"rounded{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"big{suffix}"), read(tmp_path / f"rounded{suffix}"))


def test_rounding_to_8_bits_is_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(np.asarray(Picture(values).in_8_bits()), np.rint(values / 257))


def test_premultiplied_alpha_is_divided_out(tmp_path):
    array = pixels16(4)
    array[:, :, 3] = np.maximum(array[:, :, 3], 30000)
    products = (array[:, :, :3].astype(float) * array[:, :, 3:] / 65535).round().astype(np.uint16)
    save16(np.dstack([products, array[:, :, 3]]), tmp_path / "straight.tif")
    content = (tmp_path / "straight.tif").read_bytes()
    tag = bytes.fromhex("5201 0300 0100 0000")  # ExtraSamples, one SHORT
    assert content.count(tag + b"\2\0") == 1
    (tmp_path / "premultiplied.tif").write_bytes(content.replace(tag + b"\2\0", tag + b"\1\0"))
    np.testing.assert_allclose(read(tmp_path / "premultiplied.tif").astype(int), array.astype(int), atol=2)


@pytest.mark.parametrize("name", ["odd\udcff.png", "page[page=1].png"])
def test_names_that_libvips_would_misread(tmp_path, name):
    """It expects UTF-8, with options in brackets at the end."""
    array = save(tmp_path / "deep.png", 16, 1)
    (tmp_path / "deep.png").rename(tmp_path / name)
    convert(tmp_path / name, tmp_path / f"big_{name}")
    np.testing.assert_array_equal(read(tmp_path / f"big_{name}"), array)


def test_callers_may_refuse_16_bits(tmp_path, monkeypatch):
    save(tmp_path / "deep.png", 16)
    with pytest.raises(ImageError, match="has 16 bits per channel, expected 8: convert it"):
        read_image(tmp_path / "deep.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(ImageError, match=re.escape("deep.png: needs pyvips to be read: pip install 'pyvips[binary]'")):
        read(tmp_path / "deep.png")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are open")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_no_file_stays_open(tmp_path, suffix):
    """Neither after reading, nor after a failed write, whose disk space would be lost."""
    for _ in range(3):
        save(tmp_path / f"deep{suffix}", 16)
        read(tmp_path / f"deep{suffix}")
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w+b") as full:
        png16.write_16bit(pixels16(3, 300, 300), full, {".png": "PNG", ".tif": "TIFF"}[suffix], None, None, 1)
    (tmp_path / f"cut{suffix}").write_bytes((tmp_path / f"deep{suffix}").read_bytes()[:500])
    with pytest.raises(ImageError):
        read(tmp_path / f"cut{suffix}")
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    paths = map(os.readlink, filter(os.path.islink, links))
    assert not [path for path in paths if str(tmp_path) in path or path == "/dev/full"]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_tiffs_of_few_bits(tmp_path, bits):
    levels = np.arange(20 * 16, dtype=np.uint8).reshape(20, 16) % 2**bits
    scaled = (levels * (255 // (2**bits - 1))).astype(np.uint8)
    pyvips.Image.new_from_array(scaled).tiffsave(str(tmp_path / "few.tif"), bitdepth=bits)
    with Image.open(tmp_path / "few.tif") as image:
        assert image.tag_v2[258] == (bits,)
    np.testing.assert_array_equal(read(tmp_path / "few.tif"), scaled)


def half(path):
    save16(pixels16(3, 200, 200), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def two_pages(path):
    image = pyvips.Image.new_from_array(pixels16(2, 40, 10), interpretation="grey16").copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", 20)
    image.write_to_file(str(path))


def of_type(dtype, **options):
    return lambda path: pyvips.Image.new_from_array(pixels16(4).astype(dtype), **options).write_to_file(str(path))


BAD = {
    "cut.png": (half, "truncated or damaged"),
    "cut.tif": (half, "truncated or damaged"),
    "print.tif": (
        of_type(np.uint16, interpretation="cmyk"),
        "has 4 channels of type ushort, cmyk; expected 8 bits per channel, or grey or RGB of 16",
    ),
    "float.tif": (of_type(np.float32, interpretation="rgb"), "expected"),
    "long.tif": (of_type(np.uint32), "expected"),
    "pages.tif": (two_pages, "has 2 frames or pages, expected one: split it first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    assert_refused(tmp_path / name, *BAD[name])

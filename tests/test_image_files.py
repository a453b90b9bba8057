"""Image files of 8 and 16 bits per channel: pixels and metadata in and out, and everything a file can be instead."""

import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers.images import pixels
from PIL import Image, ImageCms

from seemore_fast.errors import ImageError
from seemore_fast.io import png16
from seemore_fast.io.images import Picture, check_output, read_image, write_image

try:
    import pyvips
except ImportError:
    pyvips = None

ORIENTATION, DESCRIPTION, MAKE, ARTIST, EXIF_IFD, GPS_IFD = 0x0112, 0x010E, 0x010F, 0x013B, 0x8769, 0x8825
needs_vips = pytest.mark.skipif(pyvips is None, reason="no pyvips")
each_depth = pytest.mark.parametrize("depth", [8, pytest.param(16, marks=needs_vips)])
each_format = pytest.mark.parametrize("target", ["big.png", "big.jpg", "big.webp", "big.tif"])


def pixels16(channels, height=16, width=20):
    """Return values with random low bytes, and both ends of the range."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    values = np.random.default_rng(zlib.crc32(repr(shape).encode())).integers(0, 65536, shape, np.uint16)
    values.flat[:2] = 0, 65535
    return values


def save16(array, path, **options):
    """Write an array by libvips itself, not by our writer."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    image = pyvips.Image.new_from_array(array, interpretation="rgb16" if channels > 2 else "grey16")
    image.write_to_file(str(path), **options)


def save(path, depth, channels=3, **metadata):
    """Write a picture of 8 or 16 bits per channel; return its pixels."""
    array = pixels(channels) if depth == 8 else pixels16(channels)
    write_image(Picture(Image.fromarray(array) if depth == 8 else array, **metadata), path)
    return array


def read(path, **options):
    """Return the pixels of a file."""
    return np.asarray(read_image(path, keep_16_bit=True, **options).image)


def convert(source, target):
    """Read a file and write its pixels to another, as upscaling does; return the notes."""
    picture = read_image(source, keep_16_bit=True)
    if isinstance(picture.image, Image.Image):
        picture.image = Image.fromarray(np.asarray(picture.image))
    check_output(target, picture, picture.size)
    write_image(picture, target)
    return picture.notes


def exif_of(**tags):
    exif = Image.Exif()
    for name, value in tags.items():
        exif[globals()[name]] = value
    return exif


# Pixels


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.tiff", "a.jpg", "a.JPEG"])
def test_formats(photos, name):
    assert convert(photos / "photo.png", photos / name) == []
    with Image.open(photos / name) as image:
        assert (image.size, image.mode) == ((20, 16), "RGB")
        assert image.format == {"png": "PNG", "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF"}.get(name[2:], "JPEG")
        if image.format in ("PNG", "TIFF"):
            np.testing.assert_array_equal(np.asarray(image), pixels(3))
    assert sorted(os.listdir(photos)) == sorted(["out", "photo.png", name])


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept(tmp_path, channels, suffix):
    image = save(tmp_path / "alpha.png", 8, channels)
    assert convert(tmp_path / "alpha.png", tmp_path / f"big{suffix}") == []
    alpha = np.asarray(Image.open(tmp_path / f"big{suffix}").convert("RGBA"))[:, :, 3]
    np.testing.assert_array_equal(alpha, image[:, :, -1])


@each_depth
def test_only_opaque_alpha_may_be_dropped_for_jpeg(tmp_path, depth):
    image = save(tmp_path / "alpha.png", depth, 4)
    with pytest.raises(ImageError, match=r"big\.jpg: JPEG has no alpha channel"):
        convert(tmp_path / "alpha.png", tmp_path / "big.jpg")
    image[:, :, 3] = 2**depth - 1
    write_image(Picture(Image.fromarray(image) if depth == 8 else image), tmp_path / "opaque.png")
    convert(tmp_path / "opaque.png", tmp_path / "big.jpg")
    assert Image.open(tmp_path / "big.jpg").mode == "RGB"


def test_a_jpeg_with_a_preview_is_one_photo(tmp_path):
    photo, preview = Image.fromarray(pixels(3)), Image.new("RGB", (10, 8))
    photo.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview])
    convert(tmp_path / "phone.jpg", tmp_path / "big.jpg")
    with Image.open(tmp_path / "big.jpg") as image:
        assert image.size == (20, 16) and getattr(image, "n_frames", 1) == 1


def test_palette_with_transparency(tmp_path):
    Image.fromarray(pixels(3)).quantize(4).save(tmp_path / "palette.png", transparency=1)
    assert read_image(tmp_path / "palette.png").image.mode == "RGBA"


def chunk(name, content):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_png(path, width, height, bits, rows, *chunks):
    """Write a grey PNG by hand."""
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (2, b"\x1b"), (4, b"\x01\x23")])
def test_transparent_grey_of_few_bits(tmp_path, bits, row):
    """The pixels are 0, 1, ...; 1 is transparent."""
    width = 8 * len(row) // bits if bits > 1 else 4
    write_png(tmp_path / "few.png", width, 2, bits, 2 * (b"\0" + row), chunk(b"tRNS", struct.pack(">H", 1)))
    alpha = read(tmp_path / "few.png")[:, :, 1]
    np.testing.assert_array_equal(alpha, np.broadcast_to(np.where(np.arange(width) == 1, 0, 255), (2, width)))


@needs_vips
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_tiffs_of_few_bits(tmp_path, bits):
    levels = np.arange(20 * 16, dtype=np.uint8).reshape(20, 16) % 2**bits
    scaled = (levels * (255 // (2**bits - 1))).astype(np.uint8)
    pyvips.Image.new_from_array(scaled).tiffsave(str(tmp_path / "few.tif"), bitdepth=bits)
    with Image.open(tmp_path / "few.tif") as image:
        assert image.tag_v2[258] == (bits,)
    np.testing.assert_array_equal(read(tmp_path / "few.tif"), scaled)


# 16 bits per channel


@needs_vips
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


@needs_vips
@pytest.mark.parametrize("compression", ["none", "lzw", "deflate"])
@pytest.mark.parametrize("layout", [{}, {"tile": True}])
def test_tiffs_of_other_writers(tmp_path, compression, layout):
    array = pixels16(3, 70, 90)
    save16(array, tmp_path / "deep.tif", compression=compression, **layout)
    np.testing.assert_array_equal(read(tmp_path / "deep.tif"), array)


@needs_vips
@pytest.mark.parametrize(("order", "mode"), [("<", "I;16"), (">", "I;16B")])
def test_both_byte_orders(tmp_path, order, mode):
    array = pixels16(1)
    Image.frombytes(mode, (20, 16), array.astype(f"{order}u2").tobytes()).save(tmp_path / "grey.tif")
    np.testing.assert_array_equal(read(tmp_path / "grey.tif"), array)


@needs_vips
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


@needs_vips
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


@needs_vips
@pytest.mark.parametrize("name", ["odd\udcff.png", "page[page=1].png"])
def test_names_that_libvips_would_misread(tmp_path, name):
    """It expects UTF-8, with options in brackets at the end."""
    array = save(tmp_path / "deep.png", 16, 1)
    (tmp_path / "deep.png").rename(tmp_path / name)
    convert(tmp_path / name, tmp_path / f"big_{name}")
    np.testing.assert_array_equal(read(tmp_path / f"big_{name}"), array)


@needs_vips
def test_callers_may_refuse_16_bits(tmp_path, monkeypatch):
    save(tmp_path / "deep.png", 16)
    with pytest.raises(ImageError, match="has 16 bits per channel, expected 8: convert it"):
        read_image(tmp_path / "deep.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(ImageError, match=re.escape("deep.png: needs pyvips to be read: pip install 'pyvips[binary]'")):
        read(tmp_path / "deep.png")


@needs_vips
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
    assert not [path for path in paths if str(tmp_path) in path or "full" in path]


# Metadata


@each_depth
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation, depth):
    exif = exif_of(ORIENTATION=orientation, MAKE="Maker")
    array = save(tmp_path / "turned.png", depth, exif=exif.tobytes())
    assert convert(tmp_path / "turned.png", tmp_path / "big.png") == []
    upright = [
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: a[::-1, ::-1].swapaxes(0, 1), np.rot90,
    ][orientation - 1](array)  # fmt: skip
    for name in ("turned.png", "big.png"):
        np.testing.assert_array_equal(read(tmp_path / name), upright)
    with Image.open(tmp_path / "big.png") as image:
        assert image.getexif().get(ORIENTATION, 1) == 1 and image.getexif()[MAKE] == "Maker"


@each_format
@pytest.mark.parametrize("source", ["photo.jpg", "photo.tif"])
def test_exif_keeps_what_is_still_true(tmp_path, source, target):
    exif = exif_of(ARTIST="Someone", ORIENTATION=1)
    exif.get_ifd(EXIF_IFD).update({0x9003: "2026:01:02 03:04:05", 0xA002: 20, 0xA003: 16})  # taken at, width, height
    exif.get_ifd(GPS_IFD)[1] = "N"
    Image.fromarray(pixels(3)).save(tmp_path / source, exif=exif.tobytes())
    convert(tmp_path / source, tmp_path / target)
    with Image.open(tmp_path / target) as image:
        image.load()
        kept = image.getexif()
    assert kept[ARTIST] == "Someone" and kept.get_ifd(GPS_IFD)[1] == "N"
    assert kept.get_ifd(EXIF_IFD)[0x9003] == "2026:01:02 03:04:05" and 0xA002 not in kept.get_ifd(EXIF_IFD)


@each_format
def test_exif_of_a_bigtiff_is_kept(tmp_path, target):
    Image.fromarray(pixels(3)).save(tmp_path / "huge.tif", big_tiff=True, description="a view")
    assert (tmp_path / "huge.tif").read_bytes()[:4] == b"II+\0"
    assert convert(tmp_path / "huge.tif", tmp_path / target) == []
    with Image.open(tmp_path / target) as image:
        image.load()
        assert image.getexif()[DESCRIPTION] == "a view"


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_damaged_exif_is_left_out(tmp_path, suffix):
    Image.fromarray(pixels(3)).save(tmp_path / f"strange{suffix}", exif=b"Exif\0\0garbage")
    convert(tmp_path / f"strange{suffix}", tmp_path / "big.png")
    assert Image.open(tmp_path / "big.png").size == (20, 16)


def test_exif_that_cannot_be_written_still_turns_the_image(tmp_path, monkeypatch):
    Image.fromarray(pixels(3)).save(tmp_path / "turned.jpg", exif=exif_of(ORIENTATION=6, MAKE="Maker"))

    def fail(self, offset=8):
        raise TypeError("odd")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    picture = read_image(tmp_path / "turned.jpg")
    assert picture.size == (16, 20) and picture.notes == ["its EXIF is damaged and was left out (odd)"]


@pytest.mark.parametrize(
    ("depth", "target", "exif", "note"),
    [
        (8, "big.jpg", exif_of(DESCRIPTION="x" * 70_000), "its EXIF is too long for a JPEG and was left out"),
        pytest.param(
            16, "big.tif", exif_of(MAKE="Maker"), "its EXIF was left out: 16-bit TIFFs are written without",
            marks=needs_vips,
        ),
    ],
)  # fmt: skip
def test_exif_that_a_format_cannot_hold_is_noted(tmp_path, depth, target, exif, note):
    save(tmp_path / "made.png", depth, exif=exif.tobytes())
    assert convert(tmp_path / "made.png", tmp_path / target) == [note]


@each_depth
@each_format
def test_icc_profiles_are_kept(tmp_path, target, depth):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for source in ("colour.png", "colour.tif"):
        save(tmp_path / source, depth, icc_profile=profile)
        convert(tmp_path / source, tmp_path / target)
        assert Image.open(tmp_path / target).info["icc_profile"] == profile


def test_icc_profiles_of_other_colours_are_left_out(tmp_path):
    profile = bytes(16) + b"GRAY" + bytes(108)
    save(tmp_path / "grey.png", 8, 1, icc_profile=profile)
    assert convert(tmp_path / "grey.png", tmp_path / "big.webp") == ["its grey ICC profile was left out: WebP is RGB"]
    assert "icc_profile" not in Image.open(tmp_path / "big.webp").info
    assert convert(tmp_path / "grey.png", tmp_path / "big.png") == []
    assert Image.open(tmp_path / "big.png").info["icc_profile"] == profile
    Image.fromarray(pixels(4), "CMYK").save(tmp_path / "print.jpg", icc_profile=b"a CMYK profile")
    (note,) = convert(tmp_path / "print.jpg", tmp_path / "big.png")
    assert note.startswith("its CMYK ICC profile was left out")
    assert "icc_profile" not in Image.open(tmp_path / "big.png").info


# Files that are refused


def write_bad(folder, name):
    """Write the file that a name stands for."""
    path, photo = folder / name, Image.fromarray(pixels(3))
    noise = Image.effect_noise((200, 200), 50)
    match name:
        case "text.png":
            path.write_text("hello")
        case "empty.png":
            path.touch()
        case "folder.png":
            path.mkdir()
        case "bare.tif":  # no tags
            path.write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 0))
        case "cut.jpg" | "cut.png":
            noise.convert("RGB").save(path)
            path.write_bytes(path.read_bytes()[:3000])
        case "bomb.png":
            write_png(path, 9000, 9000, 8, 9000 * bytes(9001))
        case "huge.png":
            write_png(path, 40000, 40000, 8, bytes(40001))
        case "float.tif":
            Image.new("F", (4, 4)).save(path)
        case "moving.webp" | "pages.tif":
            photo.save(path, save_all=True, append_images=[Image.fromarray(255 - pixels(3))])
        case "other.bmp":
            photo.save(path)
        case "loop.png":
            path.symlink_to(path)


def write_bad16(folder, name):
    path, array = folder / name, pixels16(4)
    match name:
        case "cut16.png" | "cut16.tif":
            save16(pixels16(3, 200, 200), path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "print16.tif":
            pyvips.Image.new_from_array(array, interpretation="cmyk").write_to_file(str(path))
        case "float16.tif":
            pyvips.Image.new_from_array(array.astype(np.float32), interpretation="rgb").write_to_file(str(path))
        case "long16.tif":
            pyvips.Image.new_from_array(array.astype(np.uint32)).write_to_file(str(path))
        case "pages16.tif":
            two = pyvips.Image.new_from_array(pixels16(2, 40, 10), interpretation="grey16").copy()
            two.set_type(pyvips.GValue.gint_type, "page-height", 20)
            two.write_to_file(str(path))


BAD = {
    "missing.png": "does not exist",
    "text.png": "is not a PNG, JPEG, WebP or TIFF image",
    "empty.png": "is empty",
    "folder.png": "is a folder, expected an image file",
    "bare.tif": "truncated or damaged",
    "cut.jpg": "truncated or damaged",
    "cut.png": "truncated or damaged",
    "bomb.png": "over the limit of 50",
    "huge.png": "over the limit of 50",
    "float.tif": "has 32 bits per channel, expected 8 or 16",
    "moving.webp": "has 2 frames or pages, expected one: split it first",
    "pages.tif": "has 2 frames or pages, expected one: split it first",
    "other.bmp": "is not a PNG, JPEG, WebP or TIFF image",
    "loop.png": "cannot be read: Too many levels of symbolic links",
    f"{300 * 'b'}.png": "cannot be read: File name too long",
}
BAD16 = {
    "cut16.png": "truncated or damaged",
    "cut16.tif": "truncated or damaged",
    "print16.tif": "has 4 channels of type ushort, cmyk; expected 8 bits per channel, or grey or RGB of 16",
    "float16.tif": "expected",
    "long16.tif": "expected",
    "pages16.tif": "has 2 frames or pages, expected one: split it first",
}


@pytest.mark.parametrize(
    ("name", "message"), [*BAD.items(), *(pytest.param(*case, marks=needs_vips) for case in BAD16.items())]
)
def test_bad_files_are_refused(tmp_path, name, message):
    write_bad(tmp_path, name) if name in BAD else write_bad16(tmp_path, name)
    with pytest.raises(ImageError) as refused:
        read(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: ") and message in str(refused.value)


def test_errors_of_decoders_are_image_errors(photos, monkeypatch):
    def fail(self):
        raise struct.error("odd")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ImageError, match=r"photo\.png: cannot be decoded, .*: odd"):
        read(photos / "photo.png")


@pytest.mark.parametrize(
    ("depth", "name", "channels"),
    [
        (8, "a.png", 3),
        pytest.param(16, "a.png", 3, marks=needs_vips),
        pytest.param(16, "a.tif", 2, marks=needs_vips),
        pytest.param(16, "a.tif", 3, marks=needs_vips),
    ],
)
def test_the_pixel_limit_can_be_moved(tmp_path, depth, name, channels):
    array = save(tmp_path / name, depth, channels)
    with pytest.raises(ImageError, match=r"has 20x16 pixels, 0.0 megapixels, over the limit of 0.0003: raise max_meg"):
        read(tmp_path / name, max_megapixels=0.0003)
    np.testing.assert_array_equal(read(tmp_path / name, max_megapixels=0.00032), array)


# Writing


def test_sizes_that_a_format_cannot_hold(tmp_path):
    picture = Picture(Image.new("L", (8192, 1)))
    with pytest.raises(ImageError, match="the result is 16384 pixels long, WEBP allows 16383"):
        check_output(tmp_path / "big.webp", picture, (16384, 2))


def test_links_are_written_through_and_pipes_not_replaced(photos):
    (photos / "target.png").touch()
    os.symlink("target.png", photos / "link.png")
    convert(photos / "photo.png", photos / "link.png")
    assert os.path.islink(photos / "link.png") and Image.open(photos / "target.png").size == (20, 16)
    os.mkfifo(photos / "pipe.png")
    with pytest.raises(ImageError, match="a device or a pipe"):
        convert(photos / "photo.png", photos / "pipe.png")


def test_unfinished_files_of_threads_are_removed_at_exit(tmp_path):
    script = f"""
import pathlib, threading
from seemore_fast.io.atomic import replacing

begun = threading.Event()

def write():
    with replacing(pathlib.Path({str(tmp_path)!r}) / "big.png") as temporary:
        temporary.write_bytes(b"half")
        begun.set()
        threading.Event().wait()

threading.Thread(target=write, daemon=True).start()
begun.wait()
print(len(list(pathlib.Path({str(tmp_path)!r}).iterdir())))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "1\n") and list(tmp_path.iterdir()) == []

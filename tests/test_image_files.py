"""Image files: formats, metadata, and everything a file can be instead."""

import os
import struct
import subprocess
import sys
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from helpers.files import assert_refused, convert, exif_of, needs_vips, read, save
from helpers.images import pixels
from PIL import ExifTags, Image, ImageCms

from seemore_fast.errors import ImageError
from seemore_fast.io.images import Picture, check_output, read_image, write_image

Tag, IFD = ExifTags.Base, ExifTags.IFD
each_depth = pytest.mark.parametrize("depth", [8, pytest.param(16, marks=needs_vips)])
each_format = pytest.mark.parametrize("target", ["big.png", "big.jpg", "big.webp", "big.tif"])


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


# Metadata


@each_depth
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation, depth):
    exif = exif_of(Orientation=orientation, Make="Maker")
    array = save(tmp_path / "turned.png", depth, exif=exif.tobytes())
    assert convert(tmp_path / "turned.png", tmp_path / "big.png") == []
    upright = [
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: a[::-1, ::-1].swapaxes(0, 1), np.rot90,
    ][orientation - 1](array)  # fmt: skip
    for name in ("turned.png", "big.png"):
        np.testing.assert_array_equal(read(tmp_path / name), upright)
    with Image.open(tmp_path / "big.png") as image:
        assert image.getexif().get(Tag.Orientation, 1) == 1 and image.getexif()[Tag.Make] == "Maker"


def exif_after(source, target):
    """Return the EXIF of a file that another was converted to."""
    assert convert(source, target) == []
    with Image.open(target) as image:
        image.load()
        return image.getexif()


@each_format
@pytest.mark.parametrize("source", ["photo.jpg", "photo.tif"])
def test_exif_keeps_what_is_still_true(tmp_path, source, target):
    exif = exif_of(Artist="Someone", Orientation=1)
    exif.get_ifd(IFD.Exif).update({0x9003: "2026:01:02 03:04:05", 0xA002: 20, 0xA003: 16})  # taken at, width, height
    exif.get_ifd(IFD.GPSInfo)[1] = "N"
    Image.fromarray(pixels(3)).save(tmp_path / source, exif=exif.tobytes())
    kept = exif_after(tmp_path / source, tmp_path / target)
    assert kept[Tag.Artist] == "Someone" and kept.get_ifd(IFD.GPSInfo)[1] == "N"
    assert kept.get_ifd(IFD.Exif)[0x9003] == "2026:01:02 03:04:05" and 0xA002 not in kept.get_ifd(IFD.Exif)


@each_format
def test_exif_of_a_bigtiff_is_kept(tmp_path, target):
    Image.fromarray(pixels(3)).save(tmp_path / "huge.tif", big_tiff=True, description="a view")
    assert (tmp_path / "huge.tif").read_bytes()[:4] == b"II+\0"
    assert exif_after(tmp_path / "huge.tif", tmp_path / target)[Tag.ImageDescription] == "a view"


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_damaged_exif_is_left_out(tmp_path, suffix):
    Image.fromarray(pixels(3)).save(tmp_path / f"strange{suffix}", exif=b"Exif\0\0garbage")
    convert(tmp_path / f"strange{suffix}", tmp_path / "big.png")
    assert Image.open(tmp_path / "big.png").size == (20, 16)


def test_exif_that_cannot_be_written_still_turns_the_image(tmp_path, monkeypatch):
    Image.fromarray(pixels(3)).save(tmp_path / "turned.jpg", exif=exif_of(Orientation=6, Make="Maker"))
    monkeypatch.setattr(Image.Exif, "tobytes", Mock(side_effect=TypeError("odd")))
    picture = read_image(tmp_path / "turned.jpg")
    assert picture.size == (16, 20) and picture.notes == ["its EXIF is damaged and was left out (odd)"]


@pytest.mark.parametrize(
    ("depth", "target", "exif", "note"),
    [
        (8, "big.jpg", exif_of(ImageDescription="x" * 70_000), "its EXIF is too long for a JPEG and was left out"),
        pytest.param(
            16, "big.tif", exif_of(Make="Maker"), "its EXIF was left out: 16-bit TIFFs are written without",
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


def cut(content, count):
    return lambda path: path.write_bytes(content(path)[:count])


def jpeg_or_png(path):
    Image.effect_noise((200, 200), 50).convert("RGB").save(path)
    return path.read_bytes()


def two_frames(path):
    frames = [Image.fromarray(pixels(3)), Image.fromarray(255 - pixels(3))]
    frames[0].save(path, save_all=True, append_images=frames[1:])


BAD = {
    "missing.png": (lambda path: None, "does not exist"),
    "text.png": (lambda path: path.write_text("hello"), "is not a PNG, JPEG, WebP or TIFF image"),
    "empty.png": (lambda path: path.touch(), "is empty"),
    "folder.png": (lambda path: path.mkdir(), "is a folder, expected an image file"),
    "no_tags.tif": (lambda path: path.write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 0)), "truncated or damaged"),
    "cut.jpg": (cut(jpeg_or_png, 3000), "truncated or damaged"),
    "cut.png": (cut(jpeg_or_png, 3000), "truncated or damaged"),
    "bomb.png": (lambda path: write_png(path, 9000, 9000, 8, 9000 * bytes(9001)), "over the limit of 50"),
    "huge.png": (lambda path: write_png(path, 40000, 40000, 8, bytes(40001)), "over the limit of 50"),
    "float.tif": (Image.new("F", (4, 4)).save, "has 32 bits per channel, expected 8 or 16: convert it"),
    "moving.webp": (two_frames, "has 2 frames or pages, expected one: split it first"),
    "pages.tif": (two_frames, "has 2 frames or pages, expected one: split it first"),
    "other.bmp": (Image.fromarray(pixels(3)).save, "is not a PNG, JPEG, WebP or TIFF image"),
    "loop.png": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    f"{300 * 'b'}.png": (lambda path: None, "cannot be read: File name too long"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    assert_refused(tmp_path / name, *BAD[name])


def test_errors_of_decoders_are_image_errors(photos, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", Mock(side_effect=struct.error("odd")))
    with pytest.raises(ImageError, match=r"photo\.png: cannot be decoded, .*: odd"):
        read(photos / "photo.png")


@pytest.mark.parametrize(
    ("depth", "name"),
    [(8, "a.png"), pytest.param(16, "a.png", marks=needs_vips), pytest.param(16, "a.tif", marks=needs_vips)],
)
def test_the_pixel_limit_can_be_moved(tmp_path, depth, name):
    array = save(tmp_path / name, depth)
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
    script = """
import os, threading
from pathlib import Path
from seemore_fast.io.atomic import replacing

begun = threading.Event()

def write():
    with replacing(Path("big.png")):
        begun.set()
        threading.Event().wait()

threading.Thread(target=write, daemon=True).start()
begun.wait()
print(len(os.listdir()))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "1\n") and list(tmp_path.iterdir()) == []

"""`seemore-fast upscale` on real files: formats, alpha, metadata, and everything a file can be instead."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers.images import pixels
from PIL import Image, ImageCms

from seemore_fast import Upscaler, backends, memory
from seemore_fast.io.images import read_image


def chunk(name, content):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tmp") or ".tmp." in name]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.tiff", "a.jpg", "a.JPEG"])
def test_formats(photos, upscale, name):
    assert upscale(photos / "photo.png", "-o", photos / name)[0] == 0
    with Image.open(photos / name) as image:
        assert image.size == (40, 32)
        assert image.mode == "RGB"
        expected = {"png": "PNG", "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF"}.get(name.split(".")[1], "JPEG")
        assert image.format == expected
    assert not leftovers(photos)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_kept(photos, upscale, channels, suffix):
    image = pixels(channels)
    image[:, :10, -1], image[:, 10:, -1] = 0, 255
    Image.fromarray(image).save(photos / "alpha.png")
    assert upscale(photos / "alpha.png", "-o", photos / f"big{suffix}")[0] == 0
    alpha = np.asarray(Image.open(photos / f"big{suffix}").convert("RGBA"))[:, :, 3]
    assert (alpha[:, :16] == 0).all()
    assert (alpha[:, 24:] == 255).all()


def test_a_jpeg_with_a_preview_behind_it_is_one_photo(photos, upscale):
    Image.fromarray(pixels(3)).save(
        photos / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (10, 8))]
    )
    assert upscale(photos / "phone.jpg", "-o", photos / "big.jpg")[0] == 0
    with Image.open(photos / "big.jpg") as image:
        assert image.size == (40, 32)
        assert getattr(image, "n_frames", 1) == 1


def test_alpha_is_not_dropped_for_jpeg(photos, upscale):
    Image.fromarray(pixels(4)).save(photos / "alpha.png")
    status, printed = upscale(photos / "alpha.png", "-o", photos / "big.jpg")
    assert status == 1
    assert "big.jpg: is a JPEG, which has no alpha" in printed
    assert not (photos / "big.jpg").exists()


def test_palette_with_transparency(photos, upscale):
    image = Image.fromarray(pixels(3)).quantize(4)
    image.save(photos / "palette.png", transparency=1)
    assert upscale(photos / "palette.png", "-o", photos / "big.png")[0] == 0
    assert Image.open(photos / "big.png").mode == "RGBA"


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (2, b"\x1b"), (4, b"\x01\x23")])
def test_transparent_grey_of_few_bits(photos, upscale, bits, row):
    """The second of a line's pixels, 0, 1, ... is the transparent one."""
    width = 8 * len(row) // bits if bits > 1 else 4
    head = struct.pack(">IIBBBBB", width, 2, bits, 0, 0, 0, 0)
    lines = zlib.compress(2 * (b"\0" + row))
    chunks = chunk(b"IHDR", head), chunk(b"tRNS", struct.pack(">H", 1)), chunk(b"IDAT", lines), chunk(b"IEND", b"")
    (photos / "few.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    alpha = np.asarray(read_image(photos / "few.png").image)[:, :, 1]
    np.testing.assert_array_equal(alpha, np.broadcast_to(np.where(np.arange(width) == 1, 0, 255), (2, width)))
    assert upscale(photos / "few.png", "-o", photos / "big.png")[0] == 0
    assert Image.open(photos / "big.png").mode == "LA"


@pytest.mark.parametrize("target", ["big.png", "big.jpg", "big.webp", "big.tif"])
def test_what_a_bigtiff_says_is_kept(photos, upscale, target):
    Image.fromarray(pixels(3)).save(photos / "huge.tif", big_tiff=True, description="a view")
    assert (photos / "huge.tif").read_bytes()[:4] == b"II+\0"
    status, printed = upscale(photos / "huge.tif", "-o", photos / target)
    assert status == 0, printed
    with Image.open(photos / target) as image:
        image.load()
        assert image.getexif()[0x010E] == "a view"


def test_exif_that_cannot_be_written_still_turns_the_image(photos, upscale, monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    Image.fromarray(pixels(3)).save(photos / "turned.jpg", exif=exif)

    def fail(self, offset=8):
        raise TypeError("odd")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    status, printed = upscale(photos / "turned.jpg", "-o", photos / "big.png")
    assert status == 0 and "its EXIF is damaged and was left out (odd)" in printed
    assert Image.open(photos / "big.png").size == (32, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(photos, upscale, weights, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    Image.fromarray(pixels(3)).save(photos / "turned.png", exif=exif)
    assert upscale(photos / "turned.png", "-o", photos / "big.png")[0] == 0
    upright = [
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: a[::-1, ::-1].swapaxes(0, 1), np.rot90,
    ][orientation - 1](pixels(3))  # fmt: skip
    with Image.open(photos / "big.png") as image:
        expected = Upscaler(weights, device="cpu")(upright)
        np.testing.assert_allclose(np.asarray(image, int), expected.astype(int), atol=1)  # a rounding may tip over
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("target", ["big.png", "big.jpg", "big.webp", "big.tif"])
@pytest.mark.parametrize("source", ["photo.jpg", "photo.tif"])
def test_exif_keeps_what_is_still_true(photos, upscale, source, target):
    exif = Image.Exif()
    exif[0x013B], exif[0x0112] = "Someone", 1
    exif.get_ifd(0x8769).update({0x9003: "2026:01:02 03:04:05", 0xA002: 20, 0xA003: 16})  # taken at, width, height
    exif.get_ifd(0x8825)[1] = "N"
    Image.fromarray(pixels(3)).save(photos / source, exif=exif.tobytes())
    assert upscale(photos / source, "-o", photos / target)[0] == 0
    with Image.open(photos / target) as image:
        assert image.size == (40, 32)
        image.load()
        kept = image.getexif()
    assert kept[0x013B] == "Someone"
    assert kept.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"
    assert 0xA002 not in kept.get_ifd(0x8769)
    assert kept.get_ifd(0x8825)[1] == "N"


@pytest.mark.parametrize("name", ["big.png", "big.jpg", "big.webp", "big.tif"])
def test_icc_profile_is_kept(photos, upscale, name):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels(3)).save(photos / "colour.png", icc_profile=profile)
    assert upscale(photos / "colour.png", "-o", photos / name)[0] == 0
    assert Image.open(photos / name).info["icc_profile"] == profile


def test_a_profile_of_grey_does_not_go_into_a_webp(photos, upscale):
    profile = bytes(16) + b"GRAY" + bytes(108)
    Image.fromarray(pixels(3)[:, :, 0]).save(photos / "grey.png", icc_profile=profile)
    status, printed = upscale(photos / "grey.png", "-o", photos / "big.webp", "--compare", photos / "page.html")
    assert status == 0 and "its ICC profile, of grey, was left out: a WebP is RGB" in printed
    assert "icc_profile" not in Image.open(photos / "big.webp").info
    assert upscale(photos / "grey.png", "-o", photos / "big.png")[0] == 0
    assert Image.open(photos / "big.png").info["icc_profile"] == profile


def test_a_profile_of_other_colours_is_not_kept(photos, upscale):
    Image.fromarray(pixels(4), "CMYK").save(photos / "print.jpg", icc_profile=b"a CMYK profile")
    status, printed = upscale(photos / "print.jpg", "-o", photos / "big.png")
    assert status == 0 and "its ICC profile, of CMYK, was left out" in printed
    assert "icc_profile" not in Image.open(photos / "big.png").info


def write_png(path, width, height, bits, colour_type):
    """Write a PNG of zeros by hand: Pillow writes no 16-bit RGB."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    row = b"\0" * (1 + width * channels * bits // 8)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * height, 9)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_tiff(path, bits):
    """Write an uncompressed 1x1 RGB TIFF of `bits` bits a channel by hand."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 146), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 152),
            (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 3 * bits // 8), (284, 3, 1, 1)]  # fmt: skip
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    content = (b"II*\0" + struct.pack("<I", 8) + ifd).ljust(146, b"\0") + struct.pack("<3H", bits, bits, bits)
    path.write_bytes(content.ljust(152, b"\0") + b"\0" * (3 * bits // 8))


def bad_inputs(folder):
    """Return name -> what the message must say, and make the files."""
    Image.fromarray(pixels(3)).save(folder / "whole.jpg")
    Image.effect_noise((200, 200), 50).convert("RGB").save(folder / "noise.jpg")
    Image.effect_noise((200, 200), 50).save(folder / "noise.png")
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes((folder / "noise.jpg").read_bytes()[:3000])
    (folder / "cut.png").write_bytes((folder / "noise.png").read_bytes()[:3000])
    (folder / "folder.png").mkdir()
    write_png(folder / "bomb.png", 9000, 9000, 8, 0)
    write_png(folder / "huge.png", 40000, 40000, 8, 0)
    Image.new("F", (4, 4)).save(folder / "float.tif")
    frames = [Image.fromarray(pixels(3)), Image.fromarray(255 - pixels(3))]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    Image.fromarray(pixels(3)).save(folder / "other.bmp")
    return {
        "missing.png": "does not exist",
        "text.png": "is no PNG, JPEG, WebP or TIFF",
        "empty.png": "is empty",
        "cut.jpg": "truncated or damaged",
        "cut.png": "truncated or damaged",
        "folder.png": "holds no file that ends in .png",
        "bomb.png": "over the limit of 50",
        "huge.png": "over the limit of 50",
        "float.tif": "32 bits a channel",
        "moving.webp": "2 frames or pages",
        "pages.tif": "2 frames or pages",
        "other.bmp": "is no PNG, JPEG, WebP or TIFF",
    }


def test_bad_files_are_listed_and_the_good_ones_done(photos, upscale):
    expected = bad_inputs(photos)
    names = [*list(expected)[:5], "photo.png", *list(expected)[5:], "whole.jpg"]
    status, printed = upscale(*(photos / name for name in names), "-o", photos / "out")
    assert status == 1
    assert sorted(os.listdir(photos / "out")) == ["photo_x2.png", "whole_x2.jpg"]
    failures = [line for line in printed.splitlines() if line.startswith("failed: ")]
    assert len(failures) == len(expected)
    for name, message in expected.items():
        (line,) = (line for line in failures if line.startswith(f"failed: {photos / name}:"))
        assert message in line
    assert f"2 of {len(names) - 1} upscaled" in printed


@pytest.mark.skipif(backends.why_not("cpu") is not None, reason="without the engine nobody knows the bytes needed")
def test_a_photo_too_large_for_the_memory_is_one_failure(photos, upscale, monkeypatch):
    Image.new("RGB", (3000, 2000)).save(photos / "large.png")
    monkeypatch.setattr(memory, "available_memory", lambda: 2**25)
    monkeypatch.setattr(memory, "SMALL", 2**25)
    status, printed = upscale(photos / "large.png", photos / "photo.png", "-o", photos / "out")
    assert status == 1
    assert os.listdir(photos / "out") == ["photo_x2.png"]
    (failure,) = (line for line in printed.splitlines() if line.startswith("failed: "))
    assert f"{photos / 'large.png'}: an image of 3000x2000 pixels, enlarged 2 times, needs " in failure
    assert " bytes) of memory, 0.0 GiB are available: take a smaller image" in failure


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_damaged_exif_costs_no_photo(photos, upscale, suffix):
    Image.fromarray(pixels(3)).save(photos / f"strange{suffix}", exif=b"Exif\0\0garbage")
    status, printed = upscale(photos / f"strange{suffix}", "-o", photos / "big.png")
    assert status == 0, printed
    assert Image.open(photos / "big.png").size == (40, 32)


def test_files_that_break_the_decoder_are_one_failure(photos, upscale, monkeypatch):
    """A TIFF without tags, and whatever else a decoder raises."""
    (photos / "bare.tif").write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 0))
    status, printed = upscale(photos / "bare.tif", photos / "photo.png", "-o", photos / "out")
    assert status == 1
    assert "bare.tif: " in printed
    assert os.listdir(photos / "out") == ["photo_x2.png"]

    def fail(self):
        raise struct.error("odd")

    monkeypatch.setattr(Image.Image, "load", fail)
    assert "photo.png: cannot be decoded" in upscale(photos / "photo.png", "-o", photos / "big.png")[1]


def test_impossible_names_are_failures_of_one_file(photos, upscale):
    os.symlink("loop.png", photos / "loop.png")
    (photos / f"{251 * 'a'}.png").write_bytes((photos / "photo.png").read_bytes())
    names = [f"{251 * 'a'}.png", f"{300 * 'b'}.png", "loop.png", "photo.png"]
    status, printed = upscale(*(photos / name for name in names), "-o", photos / "out")
    assert status == 1
    assert printed.count("failed: ") == 3
    assert "File name too long" in printed
    assert os.listdir(photos / "out") == ["photo_x2.png"]
    assert upscale(photos / "photo.png", "-o", photos / f"{300 * 'c'}.png")[0] == 1
    assert upscale(photos / "photo.png", "-o", photos / "big.png", model=photos / f"{300 * 'm'}.pth")[0] == 1


def test_a_link_is_written_through(photos, upscale):
    (photos / "target.png").touch()
    os.symlink("target.png", photos / "link.png")
    assert upscale(photos / "photo.png", "-o", photos / "link.png")[0] == 0
    assert os.path.islink(photos / "link.png")
    assert Image.open(photos / "target.png").size == (40, 32)


def test_a_pipe_is_not_replaced(photos, upscale):
    os.mkfifo(photos / "pipe.png")
    status, printed = upscale(photos / "photo.png", "-o", photos / "pipe.png")
    assert status == 1
    assert "a device or a pipe" in printed


def test_opaque_alpha_may_go_into_a_jpeg(photos, upscale):
    image = pixels(4)
    image[:, :, 3] = 255
    Image.fromarray(image).save(photos / "opaque.png")
    assert upscale(photos / "opaque.png", "-o", photos / "big.jpg")[0] == 0
    assert Image.open(photos / "big.jpg").mode == "RGB"


def test_sizes_that_a_format_cannot_hold_are_refused_before_the_work(photos, upscale, monkeypatch):
    monkeypatch.setattr(Upscaler, "__call__", None)
    Image.new("L", (8192, 1)).save(photos / "wide.png")
    status, printed = upscale(photos / "wide.png", "-o", photos / "big.webp")
    assert status == 1
    assert "would be 16384 pixels long, and WEBP ends at 16383" in printed


def test_exif_that_a_jpeg_cannot_hold_is_left_out_with_a_word(photos, upscale):
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    Image.fromarray(pixels(3)).save(photos / "long.png", exif=exif)
    status, printed = upscale(photos / "long.png", "-o", photos / "big.jpg")
    assert status == 0
    assert "long.png: its EXIF is too long for a JPEG" in printed


def test_the_pixel_limit_can_be_moved(photos, upscale):
    assert upscale(photos / "photo.png", "-o", photos / "big.png", "--max-megapixels", "0.0003")[0] == 1
    assert upscale(photos / "photo.png", "-o", photos / "big.png", "--max-megapixels", "0.00032")[0] == 0


def test_an_8_bit_tiff_of_the_same_make_is_read(photos, upscale):
    write_tiff(photos / "plain.tif", 8)
    assert upscale(photos / "plain.tif", "-o", photos / "big.tif")[0] == 0


def test_what_a_thread_still_writes_at_the_end_of_the_process_is_removed(tmp_path):
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

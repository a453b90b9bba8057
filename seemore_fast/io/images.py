"""Image files with their metadata: whole-file reads and writes through Pillow, and libvips for 16 bits per channel."""

import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from ..errors import ImageError, os_reason
from . import png16
from .atomic import replacing, unwritable_reason

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
MAX_MEGAPIXELS = 50
PNG_LEVEL = 1  # of zlib: with Z_RLE a photo takes hardly more bytes than at level 6, and far less time
_SAVE_OPTIONS = {
    "PNG": {"compress_level": PNG_LEVEL, "compress_type": zlib.Z_RLE},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
_MAX_JPEG_EXIF = 65527
_BITS_PER_SAMPLE = 258  # TIFF tag
_TIFF_BEGINS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LASTING_TAGS = {
    ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software,
    ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo,
}  # fmt: skip
_PIXEL_DIMENSIONS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
_ROUNDED = np.rint(np.arange(2**16) / 257).astype(np.uint8)  # 16 bits to 8


@dataclass
class Picture:
    """An upright image with its metadata.

    image: 8-bit L, LA, RGB or RGBA; or an array (H, W) or (H, W, C) of uint16, C from 2 to 4.
    """

    image: Image.Image | np.ndarray
    icc_profile: bytes | None = None
    exif: bytes | None = None
    notes: list[str] = field(default_factory=list)  # what was left out

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.image.size if isinstance(self.image, Image.Image) else self.image.shape[1::-1]

    @property
    def is_opaque(self) -> bool:
        """Whether there is no alpha channel, or a fully opaque one."""
        if isinstance(self.image, Image.Image):
            return self.image.mode not in ("LA", "RGBA") or self.image.getchannel("A").getextrema()[0] == 255
        channels = self.image.shape[2] if self.image.ndim == 3 else 1
        return channels % 2 == 1 or self.image[:, :, -1].min() == 65535

    def in_8_bits(self, box: tuple[int, int, int, int] | None = None) -> Image.Image:
        """Return the image, or its part (left, top, right, bottom), with 16 bits per channel rounded to 8."""
        if isinstance(self.image, Image.Image):
            return self.image.crop(box) if box else self.image
        left, top, right, bottom = box or (0, 0, *self.size)
        return Image.fromarray(_ROUNDED[self.image[top:bottom, left:right]])


def read_image(path: Path, max_megapixels: float = MAX_MEGAPIXELS, keep_16_bit: bool = False) -> Picture:
    """Read a PNG, JPEG, WebP or TIFF file and apply its EXIF orientation.

    keep_16_bit: accept 16 bits per channel, and keep them.

    Raises ImageError, which names the file, if it is missing, not an image, damaged, animated, has more bits per
    channel, or more than `max_megapixels` million pixels. The header decides on the size, before anything is decoded.
    """
    try:
        return _read_file(path, max_megapixels, keep_16_bit)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise ImageError(f"{path}: {_read_failure(error)}") from None


def _read_failure(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "is not a PNG, JPEG, WebP or TIFF image, or its header is damaged"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {os_reason(error)}"
    return f"cannot be decoded, it is truncated or damaged: {error}"


def _read_file(path: Path, max_megapixels: float, keep_16_bit: bool) -> Picture:
    if path.is_dir():
        raise ImageError("is a folder, expected an image file")
    before = _state(path)
    if before[0] == 0:
        raise ImageError("is empty (0 bytes)")
    with _without_pillows_limit, open(path, "rb") as file:
        picture = _read(file, max_megapixels, keep_16_bit)
    if _state(path) != before:
        raise ImageError("changed while it was read: try again")
    return picture


def _state(path: Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _read(file: BinaryIO, max_megapixels: float, keep_16_bit: bool) -> Picture:
    def check(width: int, height: int, pages: int):
        _check_size(width, height, pages, max_megapixels)

    begin = file.read(4)
    try:
        image = Image.open(file, formats=sorted(set(FORMATS.values())))
    except UnidentifiedImageError:
        if not (keep_16_bit and begin in _TIFF_BEGINS):
            raise
        # For example grey with alpha of 16 bits, which Pillow does not know.
        pixels, icc_profile, orientation = png16.read_16bit(file, "TIFF", check)
        return Picture(_turned(pixels, orientation), icc_profile, None, ["its EXIF, if any, was left out"])
    with image:
        check(image.width, image.height, frame_count(image))
        bits, notes = _bits(image), []
        _scale_transparency(image)
        if bits > 8 and not (keep_16_bit and bits == 16):
            expected = "8 or 16" if keep_16_bit else "8"
            raise ImageError(f"has {bits} bits per channel, expected {expected}: convert it")
        if bits <= 8 or image.format == "PNG":  # a PNG's EXIF may follow its pixels
            image.load()
        icc_profile = image.info.get("icc_profile")
        orientation, exif = _read_exif(image, notes)
        if bits == 16:
            pixels, icc_profile, _ = png16.read_16bit(file, str(image.format), check)
            return Picture(_turned(pixels, orientation), icc_profile, exif, notes)
        if icc_profile and image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            notes.append(f"its {image.mode} ICC profile was left out: the result is RGB")
            icc_profile = None
        image = as_8_bit(image)
        if orientation != 1:
            image = Image.fromarray(_turned(np.asarray(image), orientation))
        return Picture(image, icc_profile, exif, notes)


def as_8_bit(image: Image.Image) -> Image.Image:
    """Return an L, LA, RGB or RGBA version of a Pillow image; ValueError for modes of more than 8 bits."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        if image.mode in ("L", "RGB") and "transparency" in image.info:
            return image.convert("LA" if image.mode == "L" else "RGBA")
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"image has mode {image.mode}, expected 8 bits per channel: pass 16 bits as a uint16 array")
    if image.mode in ("1", "La"):
        return image.convert("L" if image.mode == "1" and "transparency" not in image.info else "LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def frame_count(image: Image.Image) -> int:
    """Return the number of frames or pages; 1 for a phone's JPEG (MPO), whose other frames are previews."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _check_size(width: int, height: int, pages: int, max_megapixels: float):
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise ImageError(
            f"has {width}x{height} pixels, {megapixels:.1f} megapixels, over the limit of {max_megapixels:g}: "
            "raise max_megapixels (--max-megapixels) if this is intended"
        )
    if pages > 1:
        raise ImageError(f"has {pages} frames or pages, expected one: split it first")


class _WithoutPillowsLimit:
    """Suspension of Pillow's own pixel limit, which no option can raise; ours is checked on the header instead.

    The limit is global to the process: it returns when the last reading thread is done.
    """

    def __init__(self):
        self.lock, self.readers, self.limit = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if self.readers == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.readers += 1

    def __exit__(self, *error: object):
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                Image.MAX_IMAGE_PIXELS = self.limit


_without_pillows_limit = _WithoutPillowsLimit()


def _read_exif(image: Image.Image, notes: list[str]) -> tuple[int, bytes | None]:
    """Return the orientation and the lasting EXIF; of damaged EXIF, what could be read."""
    orientation = 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation, _lasting_exif(image)
    except Exception as error:  # damaged EXIF is no reason to refuse a good photo
        notes.append(f"its EXIF is damaged and was left out ({error})")
        return orientation, None


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels upright: EXIF's orientations are the eight turns and reflections, counted from 1."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _lasting_exif(image: Image.Image) -> bytes | None:
    """Return the EXIF that is also true of the upright, larger image: a TIFF's tags describe even its layout."""
    exif = image.getexif()
    for tag in set(exif) - _LASTING_TAGS:
        del exif[tag]
    for tag in _PIXEL_DIMENSIONS:
        exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
    exif.bigtiff = False  # a BigTIFF's EXIF would be written as BigTIFF, which no reader accepts
    return exif.tobytes() if len(exif) else None


def _bits(image: Image.Image) -> int:
    """Return the bits per channel of the file. Pillow decodes 16-bit RGB to 8: only its raw mode shows them."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 16 if image.mode.startswith("I") or any(";16" in mode for mode in _raw_modes(image)) else 8


def _raw_modes(image: Image.Image) -> list[str]:
    """Return the modes that the decoder of a file's pixels starts from."""
    return [str(tile[3]) for tile in getattr(image, "tile", ())]


def _scale_transparency(image: Image.Image):
    """Scale the transparent grey of a 2 or 4-bit PNG to 8 bits, as Pillow does with the pixels only."""
    transparent = image.info.get("transparency")
    if image.format == "PNG" and isinstance(transparent, int):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}.get("".join(_raw_modes(image)[:1]), 1)


def check_output(path: Path, picture: Picture, size: tuple[int, int]):
    """Raise ImageError if `path` cannot hold a picture upscaled to (width, height), before any work is done."""
    if reason := _output_obstacle(path, picture, size):
        raise ImageError(f"{path}: {reason}")


def _output_obstacle(path: Path, picture: Picture, size: tuple[int, int]) -> str | None:
    if path.suffix.lower() not in FORMATS:
        return f"ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}"
    if reason := unwritable_reason(path):
        return f"cannot be written: {reason}"
    format_name = FORMATS[path.suffix.lower()]
    if format_name == "JPEG" and not picture.is_opaque:
        return "JPEG has no alpha channel, but the image has one: write .png, .webp or .tif"
    longest, limit = max(size), _MAX_SIDE.get(format_name)
    if limit and longest > limit:
        return f"the result is {longest} pixels long, {format_name} allows {limit}: write .png or .tif"
    return None


def write_image(picture: Picture, path: Path, quality: int | None = None):
    """Write a picture atomically, in the format of the file's extension; raises ImageError, which names the file.

    quality: of JPEG and WebP, 1 to 100.
    """
    format_name = FORMATS[path.suffix.lower()]
    try:
        with replacing(path) as temporary:
            if isinstance(picture.image, np.ndarray) and format_name in png16.FORMATS:
                if picture.exif and format_name == "TIFF":
                    picture.notes.append("its EXIF was left out: 16-bit TIFFs are written without")
                with open(temporary, "w+b") as file:
                    png16.write_16bit(picture.image, file, format_name, picture.icc_profile, picture.exif, PNG_LEVEL)
            else:
                _write_8_bit(picture, temporary, format_name, quality)
    except MemoryError:
        raise
    except Exception as error:  # encoders, too, raise all kinds of errors
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise ImageError(f"{path}: cannot be written: {reason}") from None


def profile_for(picture: Picture, format_name: str) -> bytes | None:
    """Return the ICC profile to write with a picture: a WebP is RGB, which a grey profile does not describe."""
    profile = picture.icc_profile
    return None if format_name == "WEBP" and profile and profile[16:20] == b"GRAY" else profile


def _write_8_bit(picture: Picture, path: Path, format_name: str, quality: int | None):
    image, exif = picture.in_8_bits(), picture.exif
    if image is not picture.image:
        picture.notes.append(f"its 16 bits per channel were rounded to the 8 of {format_name}")
    icc_profile = profile_for(picture, format_name)
    if icc_profile != picture.icc_profile:
        picture.notes.append("its grey ICC profile was left out: WebP is RGB")
    if format_name == "JPEG":
        if image.mode in ("LA", "RGBA"):  # check_output made sure that alpha is opaque
            image = image.convert(image.mode[:-1])
        if exif and len(exif) > _MAX_JPEG_EXIF:
            picture.notes.append("its EXIF is too long for a JPEG and was left out")
            exif = None
    extras = {"icc_profile": icc_profile, "exif": exif}
    options = {**_SAVE_OPTIONS.get(format_name, {}), **{name: value for name, value in extras.items() if value}}
    if format_name == "TIFF" and len(image.getbands()) * image.width * image.height > png16.CLASSIC_TIFF:
        options["big_tiff"] = True
    if quality is not None and "quality" in options:
        options["quality"] = quality
    image.save(path, format_name, **options)

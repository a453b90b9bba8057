"""PNG and TIFF files of 16 bits per channel, through libvips: Pillow reduces their colours to 8."""

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from ..errors import ImageError

FORMATS = ("PNG", "TIFF")
CLASSIC_TIFF = 2**32 - 2**24  # bytes of pixels that 32-bit offsets reach, with room for the rest of the file


def read_16bit(
    file: BinaryIO, format_name: str, check: Callable[[int, int, int], None]
) -> tuple[np.ndarray, bytes | None, int]:
    """Return the pixels of an open file as they are stored, its ICC profile and its EXIF orientation.

    The pixels are uint16, (H, W) or (H, W, C) with C from 2 to 4; premultiplied alpha is divided out. `check` gets
    width, height and pages before anything is decoded, and may raise. Raises ImageError for other kinds of pixels and
    for damaged files.
    """
    vips = _vips()
    file.seek(0)
    load = vips.Image.pngload_source if format_name == "PNG" else vips.Image.tiffload_source
    try:
        # Row by row: otherwise libvips decodes large images into a temporary file.
        image = load(vips.Source.new_from_descriptor(file.fileno()), access="sequential", fail_on="error")
        check(image.width, image.height, _field(image, "n-pages", 1))
        if image.format != "ushort" or image.interpretation not in ("grey16", "rgb16") or image.bands > 4:
            raise ImageError(
                f"has {image.bands} channels of type {image.format}, {image.interpretation}; expected 8 bits "
                "per channel, or grey or RGB of 16, with or without alpha: convert it"
            )
        return image.numpy(), _field(image, "icc-profile-data"), _field(image, "orientation", 1)
    except vips.Error as error:
        raise ImageError(f"cannot be decoded, it is truncated or damaged: {_reason(error)}") from None


def _field(image: Any, name: str, default: Any = None) -> Any:
    return image.get(name) if image.get_typeof(name) else default


def write_16bit(
    pixels: np.ndarray, file: BinaryIO, format_name: str, icc_profile: bytes | None, exif: bytes | None, png_level: int
):
    """Write uint16 pixels, (H, W) or (H, W, C) with C from 1 to 4, to a file open as "w+b"; EXIF goes to PNG only.

    png_level: of zlib, 0 to 9. Raises OSError.
    """
    vips = _vips()
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    failures = []

    def guarded(call: Callable, failed: int | None) -> Callable:
        """Return `call` with its OSError kept, such as a full disk's: libvips would print and drop it."""

        def callback(*arguments: Any):
            try:
                return call(*arguments)
            except OSError as error:
                failures.append(error)
                return failed

        return callback

    # Not the file's descriptor: libvips would keep a copy of it, and with that the disk space of a failed file.
    target = vips.TargetCustom()
    target.on_write(guarded(file.write, -1))
    target.on_read(guarded(file.read, None))
    target.on_seek(guarded(file.seek, -1))
    try:
        image = vips.Image.new_from_array(pixels, interpretation="rgb16" if channels > 2 else "grey16").copy()
        for name, blob in {"icc-profile-data": icc_profile, "exif-data": exif}.items():
            if blob:
                image.set_type(vips.GValue.blob_type, name, blob)
        if format_name == "PNG":
            image.pngsave_target(target, compression=png_level)
        else:
            image.tiffsave_target(target, bigtiff=pixels.nbytes > CLASSIC_TIFF)
    except vips.Error as error:
        raise (failures[0] if failures else OSError(_reason(error))) from None


def _vips() -> Any:
    try:
        import pyvips
    except (ImportError, OSError) as error:  # the latter if libvips itself is missing
        raise ImageError(f"needs pyvips to be read: pip install 'pyvips[binary]' ({error})") from None
    return pyvips


def _reason(error: Any) -> str:
    return (error.detail or error.message).strip().partition("\n")[0] or "libvips gives no reason"

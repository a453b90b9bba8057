"""PNG and TIFF files of 16 bits a channel through libvips: Pillow reads and writes their colours in 8."""

from collections.abc import Callable

import numpy as np

from ..errors import ImageError

FORMATS = ("PNG", "TIFF")
CLASSIC_TIFF = 2**32 - 2**24  # bytes that offsets of 32 bits reach, less room for the rest of the file


def read_deep(file, format_name: str, check: Callable[[int, int, int], None]) -> tuple[np.ndarray, bytes | None, int]:
    """Return pixels as an open file stores them, its ICC profile, and EXIF's number of their orientation.

    The pixels are (H, W) or (H, W, C) of uint16 with C from 2 to 4; colours that are multiplied by alpha come divided
    by it. `check` is told width, height and pages before anything is decoded, and may raise. Raises ImageError for
    other kinds of pixels, and for what is damaged.
    """
    vips = _vips()
    file.seek(0)
    load = vips.Image.pngload_source if format_name == "PNG" else vips.Image.tiffload_source
    try:
        # Line by line: else libvips decodes what is large into a file of its own.
        image = load(vips.Source.new_from_descriptor(file.fileno()), access="sequential", fail_on="error")
        check(image.width, image.height, _told(image, "n-pages", 1))
        if image.format != "ushort" or image.interpretation not in ("grey16", "rgb16") or image.bands > 4:
            raise ImageError(
                f"has {image.bands} channels of type {image.format}, {image.interpretation}; expected 8 bits a "
                "channel, or grey or RGB of 16, with alpha or without: convert it"
            )
        return image.numpy(), _told(image, "icc-profile-data"), _told(image, "orientation", 1)
    except vips.Error as error:
        raise ImageError(f"cannot be decoded, it is truncated or damaged: {_reason(error)}") from None


def _told(image, name: str, default=None):
    return image.get(name) if image.get_typeof(name) else default


def write_deep(
    pixels: np.ndarray, file, format_name: str, icc_profile: bytes | None, exif: bytes | None, png_level: int
):
    """Write uint16 pixels, (H, W) or (H, W, C) with C from 1 to 4, to a file open as "w+b"; only a PNG takes EXIF.

    png_level: of zlib, 0 to 9. Raises OSError.
    """
    vips = _vips()
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    failures = []

    def guarded(call: Callable, failed: int | None) -> Callable:
        """Keep what `call` raises, which libvips would print and forget; any of them may find the disk full."""

        def callback(*arguments):
            try:
                return call(*arguments)
            except OSError as error:
                failures.append(error)
                return failed

        return callback

    # Not the file's descriptor: libvips would hold on to a copy of it, and to the room of a file that failed.
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


def _vips():
    try:
        import pyvips
    except (ImportError, OSError) as error:  # the latter where libvips itself is not found
        raise ImageError(f"needs pyvips to be read: pip install 'pyvips[binary]' ({error})") from None
    return pyvips


def _reason(error) -> str:
    lines = (error.detail or error.message).strip().splitlines()
    return lines[0] if lines else "libvips does not say why"

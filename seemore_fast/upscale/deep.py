"""PNG and TIFF files of 16 bits a channel through libvips: Pillow reads and writes their colours in 8."""

import numpy as np

from .errors import ImageError

FORMATS = ("PNG", "TIFF")
_CLASSIC_TIFF = 2**32 - 2**24  # bytes that offsets of 32 bits reach, less room for the rest of the file


def read_deep(file, format_name: str, max_pixels: float) -> tuple[np.ndarray, bytes | None]:
    """Return the upright pixels of an open file, (H, W) or (H, W, C) of uint16 with C from 2 to 4, and its ICC profile.

    Raises ImageError for other kinds of pixels, for several pages and for more than `max_pixels` before anything is
    decoded; and for what is damaged. Colours that alpha is multiplied into come divided by it.
    """
    vips = _vips()
    file.seek(0)
    load = vips.Image.pngload_source if format_name == "PNG" else vips.Image.tiffload_source
    try:
        image = load(vips.Source.new_from_descriptor(file.fileno()), fail_on="error")
        pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
        if image.width * image.height > max_pixels or pages > 1:
            raise ImageError(f"has {pages} pages of {image.width}x{image.height} pixels, expected one, and fewer")
        if image.format != "ushort" or image.interpretation not in ("grey16", "rgb16") or image.bands > 4:
            raise ImageError(
                f"has {image.bands} channels of {image.format}, {image.interpretation}: of more than 8 bits a channel, "
                "only grey and RGB of 16 are supported, with alpha or without: convert it"
            )
        profile = image.get("icc-profile-data") if image.get_typeof("icc-profile-data") else None
        return image.autorot().numpy(), profile
    except vips.Error as error:
        raise ImageError(f"cannot be decoded, it is truncated or damaged: {_reason(error)}") from None


def write_deep(
    pixels: np.ndarray, file, format_name: str, icc_profile: bytes | None, exif: bytes | None, png_level: int
):
    """Write uint16 pixels, (H, W) or (H, W, C) with C from 1 to 4, to an open file; only a PNG takes EXIF.

    png_level: of zlib, 0 to 9. Raises OSError.
    """
    vips = _vips()
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    try:
        image = vips.Image.new_from_array(pixels, interpretation="rgb16" if channels > 2 else "grey16").copy()
        for name, blob in {"icc-profile-data": icc_profile, "exif-data": exif}.items():
            if blob:
                image.set_type(vips.GValue.blob_type, name, blob)
        # Not to the file's descriptor: libvips would hold on to a copy of it, and to the room of a file that failed.
        if format_name == "PNG":
            content = image.pngsave_buffer(compression=png_level)
        else:
            content = image.tiffsave_buffer(bigtiff=pixels.nbytes > _CLASSIC_TIFF)
    except vips.Error as error:
        raise OSError(_reason(error)) from None
    file.write(content)


def _vips():
    try:
        import pyvips
    except (ImportError, OSError) as error:  # the latter where libvips itself is not found
        raise ImageError(f"has 16 bits a channel, which needs pyvips: pip install 'pyvips[binary]' ({error})") from None
    return pyvips


def _reason(error) -> str:
    lines = (error.detail or error.message).strip().splitlines()
    return lines[0] if lines else "libvips does not say why"

"""Image files of 8 and 16 bits per channel, written and read."""

import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from seemore_fast.errors import ImageError
from seemore_fast.io.images import Picture, check_output, read_image, write_image

from .images import pixels

try:
    import pyvips
except ImportError:
    pyvips = None

needs_vips = pytest.mark.skipif(pyvips is None, reason="no pyvips")


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


def assert_refused(path, write, message):
    """Write a bad file, and expect an error that names it when it is read."""
    write(path)
    with pytest.raises(ImageError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: ") and message in str(refused.value)


def exif_of(**tags):
    exif = Image.Exif()
    for name, value in tags.items():
        exif[ExifTags.Base[name]] = value
    return exif

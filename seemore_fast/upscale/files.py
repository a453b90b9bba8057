"""Upscaling of one file into another."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ImageError, file_error
from ..io.images import MAX_MEGAPIXELS, Picture, check_output, read_image, write_image


class ImageUpscaler(Protocol):
    """An `Upscaler`, as far as files need it."""

    __call__: Callable[..., Any]
    size_of: Callable[..., tuple[int, int]]


@dataclass(frozen=True)
class FileOptions:
    """Reading and writing of files; `size` are `Upscaler`'s keywords."""

    max_megapixels: float = MAX_MEGAPIXELS
    overwrite: bool = False
    quality: int | None = None
    size: dict = field(default_factory=dict)


def read(upscaler: ImageUpscaler, source: Path, target: Path, options: FileOptions) -> tuple[Picture, tuple[int, int]]:
    """Return the picture, and the width and height of its result, for which there is room in the target's format."""
    picture = read_image(source, options.max_megapixels, keep_16_bit=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    width, height = picture.size
    height, width = upscaler.size_of(height, width, **options.size)
    check_output(target, picture, (width, height))
    return picture, (width, height)


def upscale_file(upscaler: ImageUpscaler, source: Path, target: Path, options: FileOptions):
    """Upscale one file in the calling thread; see `Upscaler.upscale_file`."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise ImageError(f"{target}: is also the input, expected another file")
    try:
        picture, _ = read(upscaler, source, target, options)
    except Exception as error:
        raise ImageError(file_error(source, error)) from None
    picture.image = upscaler(picture.image, **options.size)
    write_image(picture, target, options.quality)
    for note in picture.notes:
        warnings.warn(f"{source}: {note}", stacklevel=3)

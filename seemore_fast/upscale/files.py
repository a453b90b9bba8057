"""Files to upscale: options and reading."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..io.images import MAX_MEGAPIXELS, Picture, check_output, read_image


@dataclass(frozen=True)
class FileOptions:
    """Reading and writing of files; `size` are `Upscaler`'s keywords."""

    max_megapixels: float = MAX_MEGAPIXELS
    overwrite: bool = False
    quality: int | None = None
    size: dict = field(default_factory=dict)


def read(
    size_of: Callable[..., tuple[int, int]], source: Path, target: Path, options: FileOptions
) -> tuple[Picture, tuple[int, int]]:
    """Return the picture, and the width and height of its result, for which there is room in the target's format.

    `size_of` is that of an `Upscaler`.
    """
    picture = read_image(source, options.max_megapixels, keep_16_bit=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    width, height = picture.size
    height, width = size_of(height, width, **options.size)
    check_output(target, picture, (width, height))
    return picture, (width, height)

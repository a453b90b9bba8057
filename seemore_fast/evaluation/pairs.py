"""Pairs of HR and LR images; LR is a file or computed from HR."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ..errors import ImageError, PairError, first_line, some_of
from ..io.images import FORMATS, read_image
from ..io.resize import bicubic_resize
from .metrics import SSIM_WINDOW

LOW = re.compile(r"lr([^a-z]|x|bic|mild|wild|unknown|difficult|$)", re.IGNORECASE)  # names of LR folders
T = TypeVar("T")
MAX_MEGAPIXELS = 1000  # of trusted images, to measure or to train on


@dataclass(frozen=True)
class Pair:
    """An HR file and its LR file, or None if LR is to be computed.

    name    path of the HR file in its folder, without extension
    """

    hr: Path
    lr: Path | None
    scale: int
    name: str

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return LR and HR, uint8 (H, W, 3), or (H, W) of a grey image; HR is cropped to a multiple of the scale.

        Without a file, LR is MATLAB's bicubic of the cropped HR. Raises ImageError, which names the file, for
        images that cannot be read, are too small to be measured, or do not fit.
        """
        hr = read_plain(self.hr)
        height, width = (n // self.scale * self.scale for n in hr.shape[:2])
        least = SSIM_WINDOW + 2 * self.scale
        if min(height, width) < least:
            raise ImageError(
                f"{self.hr} has {hr.shape[1]}x{hr.shape[0]} pixels, expected at least {least}x{least}: SSIM's window "
                f"and a border of {self.scale}"
            )
        hr = np.ascontiguousarray(hr[:height, :width])
        if self.lr is None:
            return bicubic_resize(hr, 1 / self.scale), hr
        lr = read_plain(self.lr)
        if lr.shape[:2] != (height // self.scale, width // self.scale):
            raise ImageError(
                f"{self.lr} has {lr.shape[1]}x{lr.shape[0]} pixels, expected {width // self.scale}x"
                f"{height // self.scale}, 1/{self.scale} of {self.hr}"
            )
        if lr.ndim != hr.ndim:
            kinds = {2: "grey", 3: "colour"}
            raise ImageError(f"{self.lr} is {kinds[lr.ndim]}, but {self.hr} is {kinds[hr.ndim]}")
        return lr, hr


def over_pairs(
    pairs: list[Pair], function: Callable[[Pair, np.ndarray, np.ndarray], T]
) -> Iterator[tuple[Pair, T | str]]:
    """Yield each pair with function(pair, LR, HR), or with the error of an image that is damaged or too large."""
    for pair in pairs:
        try:
            found = function(pair, *pair.read())
        except ImageError as error:
            found = str(error)
        except (MemoryError, RuntimeError) as error:  # of this image: its size, or a NaN output
            found = f"{pair.hr}: {first_line(error)}"
        yield pair, found


def read_plain(file: Path) -> np.ndarray:
    """Return an upright image without alpha, uint8 (H, W, 3), or (H, W) if it is grey; ImageError names the file."""
    image = read_image(file, MAX_MEGAPIXELS).image
    assert isinstance(image, Image.Image)  # of 8 bits, as 16 are not asked for
    return np.asarray(image.convert("L" if image.mode in ("L", "LA") else "RGB"))


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; raise PairError if there are none."""
    if not folder.is_dir():
        raise PairError(f"{folder} {'is a file, expected a folder' if folder.exists() else 'does not exist'}")
    files = sorted(file for file in _walk(folder) if file.suffix.lower() in FORMATS)
    if not files:
        raise PairError(f"{folder} holds no image: expected files that end in {', '.join(FORMATS)}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder; linked folders are followed, each once."""
    seen = set()
    for place, inner, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        yield from (Path(place, name) for name in files)


def list_hr(folder: Path) -> tuple[Path, dict[Path, Path]]:
    """Return the folder of HR images (`HR` in it, if present) and {file: its path there without extension}.

    Raises PairError if there is no image, or if folders of LR images are among the others.
    """
    folder = folder / "HR" if (folder / "HR").is_dir() else folder
    files = {file: file.relative_to(folder).with_suffix("") for file in list_images(folder)}
    low = [str(name) for name in files.values() if any(LOW.match(part) for part in name.parts[:-1])]
    if 0 < len(low) < len(files):
        raise PairError(
            f"{folder} holds LR images among others: {some_of(low, 10)}; give the folder of HR images alone, or name "
            "it HR and that of LR images LR_bicubic/X<scale>"
        )
    return folder, files


def find_pairs(folder: Path, scale: int, lr_folder: Path | None = None) -> list[Pair]:
    """Return the pairs of a folder of HR images, or of one with `HR` and `LR_bicubic/X<scale>` in it.

    `lr_folder` overrides the place of LR. LR files are named like HR, or with x<scale> at the end.

    Raises PairError, which lists missing files, and for an empty or missing folder.
    """
    beside = folder / "LR_bicubic" / f"X{scale}"
    given, (folder, files) = folder, list_hr(folder)
    if folder != given and beside.is_dir():
        lr_folder = lr_folder or beside
    if lr_folder is None:
        return [Pair(file, None, scale, str(name)) for file, name in files.items()]
    wanted = {file: (name, name.with_name(f"{name.name}x{scale}")) for file, name in files.items()}
    expected = f"expected NAME or NAMEx{scale} with an image's ending"
    return [Pair(hr, lr, scale, str(files[hr])) for hr, lr in match(wanted, folder, lr_folder, expected)]


def find_sets(folders: list[Path], scale: int, lr_folders: list[Path] | None = None) -> dict[str, list[Pair]]:
    """Return the pairs of data sets by their names, of folders as `find_pairs` takes them."""
    lr: list[Path | None] = [*lr_folders] if lr_folders else [None] * len(folders)
    found = [find_pairs(folder, scale, of_lr) for folder, of_lr in zip(folders, lr, strict=True)]
    return dict(zip(names_of(folders), found, strict=True))


def match(
    wanted: dict[Path, tuple[Path, ...]], folder: Path, lr_folder: Path, expected: str
) -> list[tuple[Path, Path]]:
    """Return each HR file of `folder` with the LR file in `lr_folder` at one of its wanted paths, any extension.

    Raises PairError, which lists HR files without exactly one LR file, or LR files without HR.
    """
    known: dict[Path, list[Path]] = {}
    for file in list_images(lr_folder):
        known.setdefault(file.relative_to(lr_folder).with_suffix(""), []).append(file)
    pairs, unmatched = [], []
    for file, names in wanted.items():
        found = [lr for name in names for lr in known.pop(name, [])]
        if len(found) == 1:
            pairs.append((file, found[0]))
        else:
            unmatched.append(f"{file.name} ({', '.join(lr.name for lr in found) or 'none'})")
    if unmatched:
        raise PairError(
            f"{lr_folder} has not one LR image for {len(unmatched)} of {len(wanted)} images in {folder}: "
            f"{some_of(unmatched, 10)}; {expected}"
        )
    if known:
        left = [file.name for group in known.values() for file in group]
        raise PairError(f"{folder} has no HR image for {len(left)} images in {lr_folder}: {some_of(left, 10)}")
    return pairs


def names_of(folders: list[Path]) -> list[str]:
    """Return names of data sets: the folder, or the one above `HR`, with as many parent folders as make them distinct.

    Raises PairError if a folder is repeated.
    """
    whole = [folder.resolve() for folder in folders]
    whole = [folder.parent if folder.name == "HR" else folder for folder in whole]
    if repeated := [folder for folder in whole if whole.count(folder) > 1]:
        raise PairError(f"{repeated[0]} is given more than once")

    def name(folder: Path, parts: int) -> str:
        return "/".join(folder.parts[-parts:])

    lengths = [
        next(n for n in itertools.count(1) if [name(other, n) for other in whole].count(name(folder, n)) == 1)
        for folder in whole
    ]
    return [name(folder, length) for folder, length in zip(whole, lengths, strict=True)]

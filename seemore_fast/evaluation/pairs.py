"""Images to measure: HR files, and LR of each, given or made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..resize import bicubic_resize
from ..upscale.errors import ImageError
from ..upscale.images import FORMATS, read_image
from .metrics import SSIM_WINDOW


class PairError(ValueError):
    """Folders whose images cannot be compared: says which and why."""


@dataclass(frozen=True)
class Pair:
    """An HR file, and the LR file that belongs to it, or None where LR is to be made."""

    hr: Path
    lr: Path | None
    scale: int

    @property
    def name(self) -> str:
        return self.hr.stem

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return LR and HR, uint8 (H, W, 3), or (H, W) of a grey image; HR is cropped to a multiple of the scale.

        Without a file LR is MATLAB's bicubic of the cropped HR. Raises ImageError, with the file's name, for what
        cannot be read, is too small to be measured, or does not fit.
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


def read_plain(file: Path) -> np.ndarray:
    """Return an upright image without alpha, uint8 (H, W, 3), or (H, W) if it is grey; ImageError names the file."""
    try:
        image = read_image(file).image
    except ImageError as error:
        raise ImageError(f"{file} {error}") from None
    return np.asarray(image.convert("L" if image.mode in ("L", "LA") else "RGB"))


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; PairError where there is none."""
    if not folder.is_dir():
        raise PairError(f"{folder} {'is a file, expected a folder' if folder.exists() else 'does not exist'}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in FORMATS)
    if not files:
        raise PairError(f"{folder} holds no image: expected files that end in {', '.join(FORMATS)}")
    return files


def find_pairs(folder: Path, scale: int, lr_folder: Path | None = None) -> list[Pair]:
    """Return the pairs of a folder of HR images, or of one with `HR` and `LR_bicubic/X<scale>` in it.

    `lr_folder` gives another place of LR. There an image is called as in HR, or with x<scale> at its end.

    Raises PairError that lists what is missing, and for an empty or missing folder.
    """
    inner = folder / "HR"
    if inner.is_dir():
        beside = folder / "LR_bicubic" / f"X{scale}"
        lr_folder = lr_folder or (beside if beside.is_dir() else None)
        folder = inner
    files = list_images(folder)
    if lr_folder is None:
        return [Pair(file, None, scale) for file in files]
    known = {file.relative_to(lr_folder).with_suffix(""): file for file in list_images(lr_folder)}
    pairs, missing = [], []
    for file in files:
        name = file.relative_to(folder).with_suffix("")
        found = known.get(name) or known.get(name.with_name(f"{name.name}x{scale}"))
        pairs.append(Pair(file, found, scale))
        if found is None:
            missing.append(file.name)
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise PairError(
            f"{lr_folder} has no LR image for {len(missing)} of {len(files)} images in {folder}: {some}; expected "
            f"NAME or NAMEx{scale} with an image's ending"
        )
    return pairs


def name_of(folder: Path) -> str:
    """Return what a data set is called: its folder, or the one above `HR`."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "HR" else folder.name

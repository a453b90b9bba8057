"""Images to measure: HR files, and LR of each, given or made."""

import itertools
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
    """An HR file, and the LR file that belongs to it, or None where LR is to be made.

    name    the HR file's path in its folder, without the ending
    """

    hr: Path
    lr: Path | None
    scale: int
    name: str

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
    files = {file: file.relative_to(folder).with_suffix("") for file in list_images(folder)}
    low = [str(name) for name in files.values() if any(part.lower().startswith("lr") for part in name.parts[:-1])]
    if 0 < len(low) < len(files):
        raise PairError(
            f"{folder} holds LR images among others: {_some(low)}; give the folder of HR images alone, or name it HR "
            f"and that of LR images LR_bicubic/X{scale}"
        )
    if lr_folder is None:
        return [Pair(file, None, scale, str(name)) for file, name in files.items()]
    known: dict[Path, list[Path]] = {}
    for file in list_images(lr_folder):
        known.setdefault(file.relative_to(lr_folder).with_suffix(""), []).append(file)
    pairs, complaints = [], []
    for file, name in files.items():
        found = [lr for also in (name, name.with_name(f"{name.name}x{scale}")) for lr in known.pop(also, [])]
        if len(found) == 1:
            pairs.append(Pair(file, found[0], scale, str(name)))
        else:
            complaints.append(f"{file.name} ({', '.join(lr.name for lr in found) or 'none'})")
    if complaints:
        raise PairError(
            f"{lr_folder} has not one LR image for {len(complaints)} of {len(files)} images in {folder}: "
            f"{_some(complaints)}; expected NAME or NAMEx{scale} with an image's ending"
        )
    if known:
        left = [file.name for group in known.values() for file in group]
        raise PairError(f"{folder} has no HR image for {len(left)} images in {lr_folder}: {_some(left)}")
    return pairs


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def names_of(folders: list[Path]) -> list[str]:
    """Return what data sets are called: their folders, or those above `HR`; where two are the same, the folders above
    them too. PairError where a folder is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    whole = [folder.parent if folder.name == "HR" else folder for folder in whole]
    if twice := [folder for folder in whole if whole.count(folder) > 1]:
        raise PairError(f"{twice[0]} is given twice")

    def name(folder: Path, parts: int) -> str:
        return "/".join(folder.parts[-parts:])

    lengths = [
        next(n for n in itertools.count(1) if [name(other, n) for other in whole].count(name(folder, n)) == 1)
        for folder in whole
    ]
    return [name(folder, length) for folder, length in zip(whole, lengths, strict=True)]

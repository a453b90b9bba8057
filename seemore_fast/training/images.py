"""Training images, decoded once into one memory-mapped file: high resolution, and low resolution beside it.

Low resolution is made of the whole image before anything is cut: a patch that is shrunk by itself has other borders.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import ImageError
from ..evaluation.pairs import PairError, list_hr, match, read_plain
from ..io.resize import bicubic_resize
from .config import ConfigError, Data

VERSION = 2  # of what is in a cache
_AT_ONCE = 8  # images that are decoded before they are written


@dataclass
class Images:
    """Pairs of images, uint8 RGB (H, W, 3), one after another in a memory-mapped file.

    offsets   (pairs, 2) int64: at which bytes LR and HR begin
    sizes     (pairs, 2) int64: height and width of LR; HR has `scale` times as many
    names     the HR files
    skipped   a line for each file that could not be read
    """

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]
    skipped: list[str]
    scale: int

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """All of them, (N,) uint8. What would be written to them stays in this process."""
        return np.memmap(self.path, np.uint8, "c")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __len__(self) -> int:
        return len(self.names)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return LR (H, W, 3) and HR (scale H, scale W, 3)."""
        height, width = (int(n) for n in self.sizes[index])
        found = []
        for offset, s in zip(self.offsets[index], (1, self.scale), strict=True):
            count = s * height * s * width * 3
            found.append(self.pixels[offset : offset + count].reshape(s * height, s * width, 3))
        return found[0], found[1]


def list_pairs(data: Data) -> list[tuple[Path, Path | None]]:
    """Return the HR files of all folders, sorted in each, with their LR files where those are given."""
    pairs = []
    for i, folder in enumerate(data.train):
        with _explaining("data.train"):
            hr_folder, files = list_hr(Path(folder))
        if not data.lr:
            pairs += [(file, None) for file in files]
            continue
        with _explaining("data.lr"):
            wanted = {file: (name.parent / data.lr_name.replace("{}", name.name),) for file, name in files.items()}
            pairs += match(wanted, hr_folder, Path(data.lr[i]), f"expected {data.lr_name} with an image's ending")
    return pairs


@contextlib.contextmanager
def _explaining(key: str):
    try:
        yield
    except PairError as error:
        raise ConfigError(f"{key}: {error}") from None


def read_rgb(file: Path) -> np.ndarray:
    """Return an upright image as uint8 (H, W, 3); raise ImageError, with the file's name, where it cannot be read."""
    plain = read_plain(file)
    return plain if plain.ndim == 3 else plain[:, :, None].repeat(3, axis=2)


def open_images(data: Data, scale: int, folder: Path, may_make: bool = True) -> Images:
    """Return the images of a run from their cache in `folder`, which is made where it is not there yet.

    A cache belongs to the very files (path, size, time of change), sizes, scale and format: others get one of their
    own. Damaged files are skipped, named and counted. Only a process that `may_make` it does. An image is there once
    for each of `data.sizes`, shrunk by MATLAB's bicubic: smaller ones are sharper at the pixel, and more of them.

    Raises ConfigError for folders and pairs that do not fit, and for images smaller than a patch.
    """
    pairs = list_pairs(data)
    stem = folder / f"x{scale}-{_fingerprint(pairs, scale, data.sizes)}"
    if may_make and not stem.with_suffix(".json").exists():
        _make(pairs, scale, data.sizes, stem)
    images = _open(stem, scale)
    if not len(images):
        raise ConfigError(f"data.train: none of {len(pairs)} images can be read; the first: {images.skipped[0]}")
    small = [i for i in range(len(images)) if min(images.sizes[i]) < data.patch]
    if small:
        sides = scale * images.sizes
        some = ", ".join(f"{images.names[i]} ({sides[i, 1]}x{sides[i, 0]})" for i in small[:5])
        raise ConfigError(
            f"data.patch is {data.patch}, that is {data.patch * scale} pixels of an HR image, but {len(small)} images "
            f"are smaller: {some}{', ...' if len(small) > 5 else ''}; remove them, make data.patch smaller "
            "or data.sizes larger"
        )
    return images


def _fingerprint(pairs: list[tuple[Path, Path | None]], scale: int, sizes: list[float]) -> str:
    told = [VERSION, scale, sizes]
    for file in (file for pair in pairs for file in pair if file):
        state = file.stat() if file.exists() else None  # a link that leads nowhere is a damaged image
        told.append((str(file.resolve()), *((state.st_size, state.st_mtime_ns) if state else ())))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _is_running(number: str) -> bool:
    if os.name == "nt":  # where there is no asking: a signal is an event there
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        pass
    return True


def _make(pairs: list[tuple[Path, Path | None]], scale: int, sizes: list[float], stem: Path):
    table, skipped, end = {"offsets": [], "sizes": [], "names": []}, [], 0
    for left in stem.parent.glob(f"{stem.name}.*.tmp"):  # of a process that was killed in the middle
        if not _is_running(left.suffixes[0][1:]):
            left.unlink(missing_ok=True)
    temporary = stem.with_suffix(f".{os.getpid()}.tmp")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file, tqdm(total=len(pairs), desc="decoding images", unit="image") as progress:
            for (name, _), found in zip(pairs, _decode_all(pairs, scale, sizes), strict=True):
                progress.update()
                if isinstance(found, str):
                    skipped.append(found)
                    progress.write(f"skipped: {found}")
                    continue
                for lr, hr in found:
                    table["offsets"].append((end, end + lr.size))
                    table["sizes"].append(lr.shape[:2])
                    table["names"].append(str(name))
                    file.write(lr.data)
                    file.write(hr.data)
                    end += lr.size + hr.size
        os.replace(temporary, stem.with_suffix(".bin"))
        temporary.write_text(json.dumps({**table, "skipped": skipped, "bytes": end}))
        os.replace(temporary, stem.with_suffix(".json"))  # the last: what has it is whole
    except OSError as error:
        raise ConfigError(
            f"data.cache: the pixels of {len(pairs)} images cannot be written to {stem.parent} "
            f"({free_bytes(stem.parent) / 1e6:.0f} MB are free): {error.strerror or error}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _decode_all(
    pairs: list[tuple[Path, Path | None]], scale: int, sizes: list[float]
) -> Iterator[list[tuple[np.ndarray, np.ndarray]] | str]:
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        for first in range(0, len(pairs), _AT_ONCE):
            yield from pool.map(lambda pair: _decode(*pair, scale, sizes), pairs[first : first + _AT_ONCE])


def _decode(
    file: Path, partner: Path | None, scale: int, sizes: list[float]
) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """Return LR and HR at each size, or what is wrong with them; raise ConfigError where they do not fit."""
    try:
        hr = read_rgb(file)
        lr = read_rgb(partner) if partner else None
    except ImageError as error:
        return str(error)
    if lr is None:
        smaller = [hr if size == 1 else bicubic_resize(hr, size) for size in sizes]
        cut = [_whole_pixels(image, scale) for image in smaller]
        if not all(image.size for image in cut):
            return f"{file} has {hr.shape[1]}x{hr.shape[0]} pixels, less than one of low resolution"
        return [(bicubic_resize(image, 1 / scale), image) for image in cut]
    height, width = (n // scale for n in hr.shape[:2])
    if lr.shape[:2] != (height, width):
        raise ConfigError(
            f"data.lr: {partner} has {lr.shape[1]}x{lr.shape[0]} pixels, expected {width}x{height}, "
            f"1/{scale} of the {hr.shape[1]}x{hr.shape[0]} of {file}"
        )
    return [(lr, _whole_pixels(hr, scale))]


def _whole_pixels(hr: np.ndarray, scale: int) -> np.ndarray:
    """Return HR without the rows and columns that make no whole pixel of LR."""
    height, width = (n // scale * scale for n in hr.shape[:2])
    return np.ascontiguousarray(hr[:height, :width])


def _open(stem: Path, scale: int) -> Images:
    table = json.loads(stem.with_suffix(".json").read_text())
    path = stem.with_suffix(".bin")
    if path.stat().st_size != table["bytes"]:
        stem.with_suffix(".json").unlink()
        raise ConfigError(f"data.cache: {path} has {path.stat().st_size} bytes, expected {table['bytes']}: run again")
    offsets, sizes = (np.array(table[key], np.int64).reshape(-1, 2) for key in ("offsets", "sizes"))
    return Images(path, offsets, sizes, table["names"], table["skipped"], scale)


def free_bytes(folder: Path) -> int:
    """Return the space left on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

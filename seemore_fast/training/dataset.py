"""Training images, decoded once into one memory-mapped file: pairs of LR and HR.

LR is computed of the whole image before patches are cut, since a patch reduced alone has other borders.
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

from ..errors import ConfigError, ImageError, PairError, some_of
from ..evaluation.pairs import list_hr, match, read_plain
from ..io.resize import bicubic_resize
from .config import Data

VERSION = 2  # of the cache format
_CHUNK = 8  # images decoded before they are written


@dataclass
class PairDataset:
    """Pairs of images, uint8 RGB (H, W, 3), one after another in a memory-mapped file.

    offsets   (pairs, 2) int64: first bytes of LR and HR
    sizes     (pairs, 2) int64: height and width of LR; HR is `scale` times as large
    names     HR files
    skipped   one line per file that could not be read
    """

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]
    skipped: list[str]
    scale: int

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """All bytes, (N,) uint8. Writes stay in this process."""
        return np.memmap(self.path, np.uint8, "c")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __len__(self) -> int:
        return len(self.names)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return LR (H, W, 3) and HR (scale H, scale W, 3)."""
        height, width = (int(n) for n in self.sizes[index])
        lr, hr = (
            self.pixels[offset : offset + 3 * s * height * s * width].reshape(s * height, s * width, 3)
            for offset, s in zip(self.offsets[index], (1, self.scale), strict=True)
        )
        return lr, hr


def list_pairs(data: Data) -> list[tuple[Path, Path | None]]:
    """Return the HR files of all folders, sorted within each, with their LR files or None."""
    pairs = []
    for i, folder in enumerate(data.train):
        with _naming_key("data.train"):
            hr_folder, files = list_hr(Path(folder))
        if not data.lr:
            pairs += [(file, None) for file in files]
            continue
        with _naming_key("data.lr"):
            wanted = {file: (name.parent / data.lr_name.replace("{}", name.name),) for file, name in files.items()}
            pairs += match(wanted, hr_folder, Path(data.lr[i]), f"expected {data.lr_name} with an image's ending")
    return pairs


@contextlib.contextmanager
def _naming_key(key: str):
    try:
        yield
    except PairError as error:
        raise ConfigError(f"{key}: {error}") from None


def read_rgb(file: Path) -> np.ndarray:
    """Return an upright image as uint8 (H, W, 3); raise ImageError, which names the file, if it cannot be read."""
    plain = read_plain(file)
    return plain if plain.ndim == 3 else plain[:, :, None].repeat(3, axis=2)


def open_dataset(data: Data, scale: int, folder: Path, may_create: bool = True) -> PairDataset:
    """Return the images of a run from their cache in `folder`; create it first if it is missing and `may_create`.

    A cache belongs to exactly these files (path, size, modification time), sizes, scale and format. Damaged files are
    skipped and listed. Each image is present at every one of `data.sizes`, reduced by MATLAB's bicubic: smaller ones
    are sharper per pixel.

    Raises ConfigError for folders and pairs that do not fit, and for images smaller than a patch.
    """
    pairs = list_pairs(data)
    stem = folder / f"x{scale}-{_fingerprint(pairs, scale, data.sizes)}"
    if may_create and not stem.with_suffix(".json").exists():
        _create(pairs, scale, data.sizes, stem)
    dataset = _open(stem, scale)
    if not len(dataset):
        raise ConfigError(f"data.train: none of {len(pairs)} images can be read; the first: {dataset.skipped[0]}")
    small = [i for i in range(len(dataset)) if min(dataset.sizes[i]) < data.patch]
    if small:
        sides = scale * dataset.sizes
        listed = some_of([f"{dataset.names[i]} ({sides[i, 1]}x{sides[i, 0]})" for i in small], 5)
        raise ConfigError(
            f"data.patch is {data.patch}, that is {data.patch * scale} pixels of an HR image, but {len(small)} images "
            f"are smaller: {listed}; remove them, reduce data.patch or increase data.sizes"
        )
    return dataset


def _fingerprint(pairs: list[tuple[Path, Path | None]], scale: int, sizes: list[float]) -> str:
    key = [VERSION, scale, sizes]
    for file in (file for pair in pairs for file in pair if file):
        state = file.stat() if file.exists() else None  # a broken link is a damaged image
        key.append((str(file.resolve()), *((state.st_size, state.st_mtime_ns) if state else ())))
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _is_running(pid: str) -> bool:
    if os.name == "nt":  # signal 0 is an event there, not a test
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        pass
    return True


def _create(pairs: list[tuple[Path, Path | None]], scale: int, sizes: list[float], stem: Path):
    table, skipped, end = {"offsets": [], "sizes": [], "names": []}, [], 0
    for left in stem.parent.glob(f"{stem.name}.*.tmp"):  # of a killed process
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
        os.replace(temporary, stem.with_suffix(".json"))  # written last: marks a complete cache
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
    with ThreadPoolExecutor(min(_CHUNK, os.cpu_count() or 1)) as pool:
        for first in range(0, len(pairs), _CHUNK):
            yield from pool.map(lambda pair: _decode(pair, scale, sizes), pairs[first : first + _CHUNK])


def _decode(
    pair: tuple[Path, Path | None], scale: int, sizes: list[float]
) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """Return LR and HR at each size, or the reason to skip them; raise ConfigError if they do not fit each other."""
    file, partner = pair
    try:
        hr = read_rgb(file)
        lr = read_rgb(partner) if partner else None
    except ImageError as error:
        return str(error)
    if lr is None:
        smaller = [hr if size == 1 else bicubic_resize(hr, size) for size in sizes]
        cut = [_crop(image, scale) for image in smaller]
        if not all(image.size for image in cut):
            return f"{file} has {hr.shape[1]}x{hr.shape[0]} pixels, less than one LR pixel"
        return [(bicubic_resize(image, 1 / scale), image) for image in cut]
    height, width = (n // scale for n in hr.shape[:2])
    if lr.shape[:2] != (height, width):
        raise ConfigError(
            f"data.lr: {partner} has {lr.shape[1]}x{lr.shape[0]} pixels, expected {width}x{height}, "
            f"1/{scale} of the {hr.shape[1]}x{hr.shape[0]} of {file}"
        )
    return [(lr, _crop(hr, scale))]


def _crop(hr: np.ndarray, scale: int) -> np.ndarray:
    """Return HR cropped to a multiple of the scale."""
    height, width = (n // scale * scale for n in hr.shape[:2])
    return np.ascontiguousarray(hr[:height, :width])


def _open(stem: Path, scale: int) -> PairDataset:
    table = json.loads(stem.with_suffix(".json").read_text())
    path = stem.with_suffix(".bin")
    if path.stat().st_size != table["bytes"]:
        stem.with_suffix(".json").unlink()
        raise ConfigError(f"data.cache: {path} has {path.stat().st_size} bytes, expected {table['bytes']}: run again")
    offsets, sizes = (np.array(table[key], np.int64).reshape(-1, 2) for key in ("offsets", "sizes"))
    return PairDataset(path, offsets, sizes, table["names"], table["skipped"], scale)


def free_bytes(folder: Path) -> int:
    """Return the free disk space at a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

"""Conversion of image arrays: dtypes, value ranges and sizes."""

import numpy as np
import torch

from ..io.resize import bicubic_bands


def check_array(image: np.ndarray):
    """Raise TypeError or ValueError for arrays that are not images."""
    if image.dtype.newbyteorder("=") not in (np.uint8, np.uint16) and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image has dtype {image.dtype}, expected uint8, uint16 or a floating type in [0, 1]")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}, expected (H, W) or (H, W, C) with C from 1 to 4, none empty")


def max_value(dtype: np.dtype) -> int:
    """Return the value that stands for 1."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1


def as_tensor(image: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the array's memory, or holds a copy if torch does not support its strides."""
    is_simple = image.flags.writeable and all(s >= 0 and s % image.itemsize == 0 for s in image.strides)
    return torch.from_numpy(image if is_simple else image.copy("C"))


def to_unit(image: np.ndarray) -> np.ndarray:
    """Return float32 in [0, 1], writable and contiguous."""
    unit = np.array(image, dtype=np.float32)
    if np.issubdtype(image.dtype, np.integer):
        unit /= max_value(image.dtype)
    return unit


def from_unit(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return [0, 1] floats, which are overwritten, as `dtype`: clipped, and rounded to the nearest integers."""
    image.clip(0, 1, out=image)
    if np.issubdtype(dtype, np.integer):
        image *= max_value(dtype)
        np.rint(image, out=image)
    return image.astype(dtype, copy=False)


def resized(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return (H, W, C) resampled to a size, of the same dtype; plane by plane, which takes less memory."""
    if planes.shape[:2] == size:
        return planes
    return np.dstack([_resized(planes[:, :, c], size) for c in range(planes.shape[2])])


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    result, is_integer = np.empty(size, plane.dtype), np.issubdtype(plane.dtype, np.integer)
    for top, rows in bicubic_bands(plane, *size):
        rows.clip(0, max_value(plane.dtype), out=rows)
        result[top : top + len(rows)] = np.rint(rows) if is_integer else rows
    return result

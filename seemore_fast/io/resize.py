"""MATLAB's antialiased bicubic resize: the field's downscaling for low resolution images, and baseline upscaler."""

from collections.abc import Callable, Iterator

import numpy as np

BAND_PIXELS = 2**18  # pixels per band, of the wider of image and result


def bicubic_resize(image: np.ndarray, scale: float) -> np.ndarray:
    """Resize as MATLAB's ``imresize(image, scale)`` does, bit for bit on uint8.

    | array   | shape                                        | dtype                             |
    |---------|----------------------------------------------|-----------------------------------|
    | image   | (H, W) or (H, W, C)                          | uint8, or floating                |
    | returns | (ceil(H * scale), ceil(W * scale)[, C])      | uint8, rounded after each pass; or float64 |

    Rows first, then columns. Downscaling widens the kernel by 1 / scale (antialiasing). The image is mirrored at its
    borders.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image has dtype {image.dtype}, expected uint8 or a floating type")
    is_rounded = image.dtype == np.uint8
    size = [int(np.ceil(side * scale)) for side in image.shape[:2]]
    result = np.empty((*size, *image.shape[2:]), np.uint8 if is_rounded else np.float64)
    taps = [_taps(side, scale, count) for side, count in zip(image.shape, size, strict=False)]
    for top, rows in _bands(image, taps, _rounded if is_rounded else lambda rows: rows):
        result[top : top + len(rows)] = rows
    return result


def bicubic_bands(image: np.ndarray, height: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the image resized to height x width, unrounded, in bands: their first row, and their rows in float64.

    Each axis has a scale of its own, as in MATLAB's ``imresize(image, [height, width])``; see `bicubic_resize`.
    image: (H, W) or (H, W, C) of any real type, read band by band.
    """
    taps = [_taps(side, wanted / side, wanted) for side, wanted in zip(image.shape, (height, width), strict=False)]
    return _bands(image, taps, lambda rows: rows)


def _rounded(rows: np.ndarray) -> np.ndarray:
    return np.floor(rows.clip(0, 255) + 0.5)


def _bands(image: np.ndarray, taps: list, after_each_pass: Callable) -> Iterator[tuple[int, np.ndarray]]:
    (weights, positions), columns = taps
    count = max(BAND_PIXELS // max(image.shape[1], len(columns[0])), 1)
    for top in range(0, len(weights), count):
        band = slice(top, top + count)
        first, last = positions[band].min(), positions[band].max()
        rows = image[first : last + 1].astype(np.float64)
        rows = after_each_pass(_combined(rows, weights[band], positions[band] - first, axis=0))
        yield top, after_each_pass(_combined(rows, *columns, axis=1))


def _combined(rows: np.ndarray, weights: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Return the weighted sums of rows, or of columns, of an image."""
    shape = (-1, *[1] * (rows.ndim - 1 - axis))
    total = np.zeros(())
    for tap in range(weights.shape[1]):
        total = total + weights[:, tap].reshape(shape) * rows.take(positions[:, tap], axis)
    return total


def _taps(length: int, scale: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and source positions, both (count, taps), of an axis of `length` pixels."""
    shrink = min(scale, 1.0)
    width = 4 / shrink
    centre = (np.arange(count) + 0.5) / scale - 0.5
    positions = np.floor(centre - width / 2)[:, None] + np.arange(np.ceil(width) + 2)
    weights = shrink * _cubic(shrink * (centre[:, None] - positions))
    weights /= weights.sum(axis=1, keepdims=True)
    mirror = np.concatenate([np.arange(length), np.arange(length)[::-1]])
    positions = mirror[positions.astype(np.int64) % (2 * length)]
    used = weights.any(axis=0)
    return weights[:, used], positions[:, used]


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))

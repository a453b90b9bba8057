"""MATLAB's antialiased bicubic resize: how the field makes low resolution images, and its baseline upscaler."""

import numpy as np


def bicubic_resize(image: np.ndarray, scale: float) -> np.ndarray:
    """Resize as MATLAB's ``imresize(image, scale)`` does, bit for bit on uint8.

    | array   | shape                                        | dtype                             |
    |---------|----------------------------------------------|-----------------------------------|
    | image   | (H, W) or (H, W, C)                          | uint8, or floating                |
    | returns | (ceil(H * scale), ceil(W * scale)[, C])      | uint8, rounded after each pass; or float64 |

    Rows first, then columns. When it shrinks, the kernel is widened by 1 / scale (antialiasing). Outside the image
    lie its mirrored pixels.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    return _resized(image, tuple((int(np.ceil(side * scale)), scale) for side in image.shape[:2]))


def bicubic_resize_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to a size, each axis by a scale of its own: MATLAB's ``imresize(image, [height, width])``.

    As `bicubic_resize` otherwise.
    """
    sides = zip(image.shape, (height, width), strict=False)
    return _resized(image, tuple((wanted, wanted / side) for side, wanted in sides))


def _resized(image: np.ndarray, ways: tuple[tuple[int, float], ...]) -> np.ndarray:
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image has dtype {image.dtype}, expected uint8 or a floating type")
    for axis, (count, scale) in enumerate(ways):
        weights, positions = _taps(image.shape[axis], scale, count)
        lines = np.moveaxis(image, axis, 0).astype(np.float64, copy=False)
        resized = np.zeros((len(weights), *lines.shape[1:]))
        for tap in range(weights.shape[1]):
            shape = (-1, *[1] * (lines.ndim - 1))
            resized += weights[:, tap].reshape(shape) * lines[positions[:, tap]]
        if image.dtype == np.uint8:
            resized = np.floor(resized.clip(0, 255) + 0.5).astype(np.uint8)
        image = np.moveaxis(resized, 0, axis)
    return np.ascontiguousarray(image)


def _taps(length: int, scale: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and source positions, both (count, taps), of a line of `length` pixels."""
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

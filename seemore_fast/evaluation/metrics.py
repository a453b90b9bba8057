"""Picture quality as the super-resolution field measures it."""

import math

import numpy as np


def luma(image: np.ndarray) -> np.ndarray:
    """Return Y of MATLAB's rgb2ycbcr (studio range, 16 to 235), float64 (H, W), of an RGB uint8 image (H, W, 3).

    A greyscale image (H, W) is its own Y: its raw values, as the published averages take Set14's `bridge`.
    """
    if image.ndim == 2:
        return image.astype(np.float64)
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr_y(image: np.ndarray, truth: np.ndarray, crop: int = 0) -> float:
    """Return the peak signal-to-noise ratio on Y in dB; infinite for equal images.

    Both images are uint8, (H, W, 3) or (H, W), of one size; `crop` pixels (the scale) are left out at every border.
    """
    if image.shape != truth.shape:
        raise ValueError(f"image has shape {image.shape}, expected {truth.shape}, the shape of truth")
    difference = luma(image) - luma(truth)
    difference = difference[crop : difference.shape[0] - crop, crop : difference.shape[1] - crop]
    mse = np.mean(difference**2)
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)

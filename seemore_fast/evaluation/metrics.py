"""PSNR and SSIM on the Y channel, as is customary in super-resolution."""

import functools
import math

import numpy as np

SSIM_WINDOW = 11


def luma(image: np.ndarray) -> np.ndarray:
    """Return Y of MATLAB's rgb2ycbcr (studio range, 16 to 235), float64 (H, W), of an RGB uint8 image (H, W, 3).

    Y of a greyscale image (H, W) is its raw values, as in the published averages (Set14's `bridge`).
    """
    if image.ndim == 2:
        return image.astype(np.float64)
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr_y(image: np.ndarray, truth: np.ndarray, crop: int = 0) -> float:
    """Return the peak signal-to-noise ratio on Y in dB; infinite for equal images.

    Both images are uint8, (H, W, 3) or (H, W), of one size; `crop` pixels (the scale) are cut off at every border.
    """
    if image.shape != truth.shape:
        raise ValueError(f"image has shape {image.shape}, expected {truth.shape}, the shape of truth")
    difference = luma(image) - luma(truth)
    difference = difference[crop : difference.shape[0] - crop, crop : difference.shape[1] - crop]
    mse = np.mean(difference**2)
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ssim_y(image: np.ndarray, truth: np.ndarray, crop: int = 0) -> float:
    """Return the structural similarity on Y, at most 1 (Wang et al. 2004); arguments are those of `psnr_y`.

    Means, variances and the covariance are taken under every Gaussian window of 11x11 pixels and sigma 1.5 that lies
    inside the image; the constants are (0.01 * 255)^2 and (0.03 * 255)^2.
    """
    if image.shape != truth.shape:
        raise ValueError(f"image has shape {image.shape}, expected {truth.shape}, the shape of truth")
    x, y = (luma(i)[crop : i.shape[0] - crop, crop : i.shape[1] - crop] for i in (image, truth))
    if min(x.shape) < SSIM_WINDOW:
        raise ValueError(
            f"image has {x.shape[1]}x{x.shape[0]} pixels inside a border of {crop}, expected at least "
            f"{SSIM_WINDOW}x{SSIM_WINDOW}, SSIM's window"
        )
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(similar / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def _windowed(plane: np.ndarray) -> np.ndarray:
    """Return the weighted means under the window at every place (separable filter)."""
    window = np.exp(-0.5 * (np.arange(-(SSIM_WINDOW // 2), SSIM_WINDOW // 2 + 1) / 1.5) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        places = plane.shape[axis] - SSIM_WINDOW + 1
        plane = functools.reduce(np.add, (w * plane.take(range(i, i + places), axis) for i, w in enumerate(window)))
    return plane

"""PSNR and SSIM on Y, against worked values and other implementations."""

import math

import numpy as np
import pytest

from seemore_fast.evaluation import luma, psnr_y, ssim_y


def test_luma_is_that_of_matlab():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours)[0], [16, 235.0, 81.481, 144.553, 40.966], atol=0.02)
    grey = np.array([[0, 200]], np.uint8)
    np.testing.assert_array_equal(luma(grey), [[0, 200]])


def test_psnr_of_a_known_difference():
    truth = np.full((8, 8), 100, np.uint8)
    image = truth + np.uint8(5)
    assert psnr_y(image, truth) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr_y(truth, truth) == math.inf


def test_crop_ignores_the_border():
    truth = np.zeros((10, 10), np.uint8)
    image = truth.copy()
    image[:2], image[5, 5] = 255, 30
    assert psnr_y(image, truth, crop=2) == pytest.approx(10 * math.log10(255**2 / (900 / 36)))


def test_ssim_of_equal_and_of_constant_images():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (20, 24, 3), np.uint8)
    assert ssim_y(truth, truth) == pytest.approx(1)
    x, y = np.full((12, 12), 100, np.uint8), np.full((12, 12), 120, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim_y(x, y) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))


def test_ssim_against_its_definition():
    """Each window separately, with the weights of a two-dimensional Gaussian."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (2, 17, 15), np.uint8)
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(1, 17 - 11):
        for left in range(1, 15 - 11):
            a, b = (image[top : top + 11, left : left + 11].astype(float) for image in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    assert ssim_y(x, y, crop=1) == pytest.approx(np.mean(values), abs=1e-12)


@pytest.mark.parametrize("crop", [0, 2, 3])
def test_both_agree_with_scikit_image(crop):
    color, metrics = (pytest.importorskip(f"skimage.{name}") for name in ("color", "metrics"))
    rng = np.random.default_rng(2)
    truth = np.kron(rng.integers(0, 256, (9, 8, 3)), np.ones((5, 6, 1))).astype(np.uint8)
    image = (truth + rng.normal(0, 20, truth.shape)).clip(0, 255).astype(np.uint8)
    inner = (slice(crop, -crop or None),) * 2
    ours, theirs = (color.rgb2ycbcr(pixels)[..., 0][inner] for pixels in (image, truth))
    wanted = metrics.peak_signal_noise_ratio(theirs, ours, data_range=255)
    assert psnr_y(image, truth, crop) == pytest.approx(wanted, abs=1e-6)
    wanted = metrics.structural_similarity(
        theirs, ours, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim_y(image, truth, crop) == pytest.approx(wanted, abs=1e-6)


def test_errors():
    image, other = np.zeros((13, 12), np.uint8), np.zeros((13, 13), np.uint8)
    for measure in (psnr_y, ssim_y):
        with pytest.raises(ValueError, match=r"\(13, 12\), expected \(13, 13\), the shape of truth"):
            measure(image, other)
    with pytest.raises(ValueError, match=r"has 10x11 pixels inside a border of 1, expected at least 11x11"):
        ssim_y(image, image, crop=1)

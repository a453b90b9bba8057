"""PSNR on Y, against worked values and the published figures of bicubic interpolation."""

import math

import numpy as np
import pytest
from PIL import Image

from seemore_fast.evaluation import luma, psnr_y
from seemore_fast.resize import bicubic_resize


def test_luma_is_matlabs():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours)[0], [16, 235.0, 81.481, 144.553, 40.966], atol=0.02)
    grey = np.array([[0, 200]], np.uint8)
    np.testing.assert_array_equal(luma(grey), [[0, 200]])


def test_psnr_of_a_known_difference():
    truth = np.full((8, 8), 100, np.uint8)
    image = truth + np.uint8(5)
    assert psnr_y(image, truth) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr_y(truth, truth) == math.inf


def test_crop_leaves_the_border_out():
    truth = np.zeros((10, 10), np.uint8)
    image = truth.copy()
    image[:2], image[5, 5] = 255, 30
    assert psnr_y(image, truth, crop=2) == pytest.approx(10 * math.log10(255**2 / (900 / 36)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(4, 4\), expected \(4, 5\)"):
        psnr_y(np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8))


@pytest.mark.parametrize(("scale", "expected"), [(2, 33.67), (3, 30.40), (4, 28.43)])
def test_bicubic_on_set5(data, scale, expected):
    values = []
    for file in sorted((data / "test/Set5/HR").glob("*.png")):
        hr = np.asarray(Image.open(file).convert("RGB"))
        height, width = (size // scale * scale for size in hr.shape[:2])
        hr = hr[:height, :width]
        values.append(psnr_y(bicubic_resize(bicubic_resize(hr, 1 / scale), scale), hr, crop=scale))
    assert np.mean(values) == pytest.approx(expected, abs=0.006)

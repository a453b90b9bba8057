"""MATLAB's bicubic resize, also against the official low resolution images if --data has them."""

import numpy as np
import pytest
from PIL import Image

from seemore_fast.io.resize import bicubic_bands, bicubic_resize


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_the_official_set5_bit_for_bit(data, scale):
    files = sorted((data / "test/Set5/HR").glob("*.png"))
    assert len(files) == 5
    for file in files:
        hr = np.asarray(Image.open(file).convert("RGB"))
        lr = np.asarray(Image.open(data / f"test/Set5/LR_bicubic/X{scale}/{file.stem}x{scale}.png").convert("RGB"))
        height, width = (size // scale * scale for size in hr.shape[:2])
        np.testing.assert_array_equal(bicubic_resize(hr[:height, :width], 1 / scale), lr)


def naive_line(line, scale):
    """Resize a float line by the definition: a cubic kernel around each target's centre, mirrored borders."""

    def cubic(x):
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    stretch, result = min(scale, 1), []
    for i in range(int(np.ceil(len(line) * scale))):
        centre = (i + 0.5) / scale - 0.5
        total = weight_sum = 0.0
        for j in range(int(centre - 3 / stretch) - 1, int(centre + 3 / stretch) + 2):
            mirrored = j % (2 * len(line))
            mirrored = mirrored if mirrored < len(line) else 2 * len(line) - 1 - mirrored
            weight = cubic(stretch * (centre - j))
            total, weight_sum = total + weight * line[mirrored], weight_sum + weight
        result.append(total / weight_sum)
    return np.array(result)


@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4, 1.7])
@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_equals_the_definition(length, scale):
    line = np.random.default_rng(0).random(length)
    expected = naive_line(line, scale)
    np.testing.assert_allclose(bicubic_resize(line[:, None], scale)[:, 0], expected, atol=1e-12)
    np.testing.assert_allclose(bicubic_resize(line[None], scale)[0], expected, atol=1e-12)


def test_uint8_is_rounded_after_each_pass_and_clipped():
    image = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (9, 8, 3))
    rows = np.stack([[naive_line(image[:, x, c], 2) for c in range(3)] for x in range(8)]).transpose(2, 0, 1)
    rows = np.floor(rows.clip(0, 255) + 0.5)
    both = np.stack([[naive_line(rows[y, :, c], 2) for c in range(3)] for y in range(18)]).transpose(0, 2, 1)
    np.testing.assert_array_equal(bicubic_resize(image, 2), np.floor(both.clip(0, 255) + 0.5))


def test_flat_images_stay_flat():
    image = np.full((5, 7, 3), 201, np.uint8)
    assert (bicubic_resize(image, 3) == 201).all()
    assert bicubic_resize(image, 3).shape == (15, 21, 3)


def test_bad_input():
    with pytest.raises(TypeError, match="int32"):
        bicubic_resize(np.zeros((4, 4), np.int32), 2)
    with pytest.raises(ValueError, match="scale is 0"):
        bicubic_resize(np.zeros((4, 4)), 0)


def test_each_axis_has_a_scale_of_its_own():
    image = np.random.default_rng(0).random((23, 31, 2))
    result = np.concatenate([rows for _, rows in bicubic_bands(image, 40, 17)])
    rows = np.stack([naive_line(column, 40 / 23) for column in image[:, :, 0].T], axis=1)
    expected = np.stack([naive_line(row, 17 / 31) for row in rows])
    assert result.shape == (40, 17, 2)
    np.testing.assert_allclose(result[:, :, 0], expected, atol=1e-12)
    doubled = np.concatenate([rows for _, rows in bicubic_bands(image, 46, 62)])
    np.testing.assert_array_equal(doubled, bicubic_resize(image, 2))

"""The small training script: its parts, and a run from files to weights."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from seemore_fast import load_model, seemore_t
from seemore_fast.resize import bicubic_resize
from seemore_fast.training.__main__ import load_pairs, random_batch, start_from_interpolation


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deeper").mkdir()
    for name in ("a.png", "deeper/b.webp"):
        smooth = bicubic_resize(rng.integers(0, 256, (10, 14, 3), np.uint8), 5)
        Image.fromarray(smooth[:49]).save(tmp_path / name, lossless=True)
    return tmp_path


def test_pairs_are_made_of_whole_images(photos):
    pairs = load_pairs(photos, 2)
    assert [hr.shape for _, hr in pairs] == [(48, 70, 3)] * 2
    for lr, hr in pairs:
        np.testing.assert_array_equal(lr, bicubic_resize(hr, 0.5))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match="holds no PNG"):
        load_pairs(tmp_path, 2)


def test_crops_of_a_pair_show_the_same_place(photos):
    pairs = load_pairs(photos, 2)
    lr, hr = random_batch(pairs, batch=16, patch=16, scale=2, rng=np.random.default_rng(0))
    assert lr.shape == (16, 3, 16, 16)
    assert hr.shape == (16, 3, 32, 32)
    halved = F.avg_pool2d(hr, 2)
    # The photos are smooth: where place, flip and turn agree, halving comes near; elsewhere it is far off.
    assert (halved - lr).abs().mean() < 0.02
    assert (halved.flip(-1) - lr).abs().mean() > 0.1
    assert len({crop.sum().item() for crop in lr}) == 16


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_training_starts_from_bilinear_interpolation(scale):
    model = seemore_t(scale).eval()
    start_from_interpolation(model)
    with torch.no_grad():
        model.upsampler[0].weight[:, model.in_chans :] = 0  # what the other channels add at random
        x = torch.rand(1, 3, 20, 24)
        expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        inside = slice(2 * scale, -2 * scale)
        y = model(x)
    torch.testing.assert_close(y[..., inside, inside], expected[..., inside, inside], rtol=0, atol=1e-5)


def test_a_run_writes_weights_that_load(photos, tmp_path):
    out = tmp_path / "t.safetensors"
    command = [sys.executable, "-m", "seemore_fast.training", "--data", photos, "--out", out]
    command += ["--minutes", "0.02", "--batch", "1", "--patch", "16"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = load_model(out)
    torch.manual_seed(0)
    start = seemore_t(2)
    start_from_interpolation(start)
    assert model.config == start.config
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2, "the weights are still those it started from"


def test_the_shipped_weights_beat_bicubic_on_set5(data):
    from seemore_fast import Upscaler
    from seemore_fast.evaluation import psnr_y

    upscaler, values = Upscaler("seemore_t_x2", device="cpu"), []
    for file in sorted((data / "test/Set5/HR").glob("*.png")):
        hr = np.asarray(Image.open(file).convert("RGB"))
        height, width = (size // 2 * 2 for size in hr.shape[:2])
        lr = np.asarray(Image.open(data / f"test/Set5/LR_bicubic/X2/{file.stem}x2.png").convert("RGB"))
        values.append(psnr_y(upscaler(lr), hr[:height, :width], crop=2))
    assert np.mean(values) >= 36.5  # bicubic: 33.67

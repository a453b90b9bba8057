"""Training images and patches: decoded once, LR of the whole image, patches that depend on seed and step alone."""

import errno
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pydantic", reason="needs the train extra")

from seemore_fast.errors import ConfigError
from seemore_fast.io.resize import bicubic_resize
from seemore_fast.training.config import Data
from seemore_fast.training.dataset import open_dataset
from seemore_fast.training.patches import Batches, Patches, load_batches


def smooth(rng, height, width):
    return bicubic_resize(rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8), 5)[:height, :width]


def cropped(image, scale=2):
    height, width = (n // scale * scale for n in image.shape[:2])
    return image[:height, :width]


@pytest.fixture
def photos(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "deeper/b.webp", "c.png"):
        Image.fromarray(smooth(rng, *rng.integers(49, 80, 2))).save(folder / name, lossless=True)
    return folder


@pytest.fixture
def opened(photos, tmp_path):
    """Return a function that opens the photos as a data set, with options of `Data`."""

    def opened(scale=2, **options):
        return open_dataset(Data(**{"train": [str(photos)], "patch": 16, **options}), scale, tmp_path / "cache")

    return opened


# Images


@pytest.mark.parametrize("scale", [2, 3])
def test_pairs_are_of_whole_images(photos, opened, scale):
    pairs = opened(scale)
    assert [name.removeprefix(f"{photos}/") for name in pairs.names] == ["a.png", "c.png", "deeper/b.webp"]
    for i, name in enumerate(pairs.names):
        lr, hr = pairs.pair(i)
        np.testing.assert_array_equal(hr, cropped(np.asarray(Image.open(name)), scale))
        np.testing.assert_array_equal(lr, bicubic_resize(hr, 1 / scale))


def test_images_at_each_size(photos, opened):
    (photos / "broken.png").write_bytes(b"no image")
    pairs = opened(sizes=[1, 0.5], patch=8)
    assert len(pairs) == 6 and len(pairs.skipped) == 1
    for i in range(3):
        name = pairs.names[2 * i]
        assert pairs.names[2 * i + 1] == name
        lr, hr = pairs.pair(2 * i + 1)
        np.testing.assert_array_equal(hr, cropped(bicubic_resize(np.asarray(Image.open(name)), 0.5)))
        np.testing.assert_array_equal(lr, bicubic_resize(hr, 0.5))
    assert len(opened(patch=8)) == 3  # another cache
    with pytest.raises(ConfigError, match=r"3 images are smaller: .*, reduce data.patch or increase data.sizes"):
        opened(sizes=[1, 0.375])


def test_cache_is_created_once_and_belongs_to_its_files(photos, opened, tmp_path):
    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    opened()
    first = times()
    opened()
    assert times() == first and len(first) == 2
    Image.fromarray(smooth(np.random.default_rng(1), 60, 60)).save(photos / "a.png")
    assert opened().pair(0)[1].shape == (60, 60, 3)


def test_files_of_killed_processes_are_removed(opened, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    opened()
    (table,) = (tmp_path / "cache").glob("*.json")
    table.unlink()
    left = table.with_suffix(f".{ended.pid}.tmp"), table.with_suffix(f".{os.getppid()}.tmp")
    for path in left:
        path.write_bytes(b"half of the pixels")
    opened()
    assert table.exists() and not left[0].exists() and left[1].exists()


def test_given_lr_is_used(photos, opened, tmp_path):
    lr = tmp_path / "lr"
    for file in photos.rglob("*.*"):
        target = (lr / file.relative_to(photos)).with_name(f"{file.stem}x2.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - bicubic_resize(cropped(np.asarray(Image.open(file))), 0.5)).save(target)

    def with_lr(name="{}x2"):
        return opened(lr=[str(lr)], lr_name=name)

    for small, large in map(with_lr().pair, range(3)):
        np.testing.assert_array_equal(small, 255 - bicubic_resize(large, 0.5))
    expected = r"data.lr: .*lr has not one LR image for 3 of 3 images in .*photos: a.png \(none\), .*; expected "
    for name in ("{}", "{}{}", "{}_{scale}", "deeper/{}x2"):
        with pytest.raises(ConfigError, match=expected) as caught:
            with_lr(name)
        assert str(caught.value).endswith(f"expected {name} with an image's ending")
    Image.new("RGB", (7, 7)).save(lr / "ax2.png")
    with pytest.raises(ConfigError, match=r"ax2\.png has 7x7 pixels, expected .*, 1/2 of the"):
        with_lr()


def test_lr_beside_hr_is_not_trained_on(photos, opened, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(photos, root / "HR")
    shutil.copytree(photos, root / "LR_bicubic" / "X2")
    assert len(opened(train=[str(root)])) == 3  # of HR alone
    (root / "HR").rename(root / "GT")
    with pytest.raises(ConfigError, match=r"data.train: .*set holds LR images among others: LR_bicubic/X2/a, "):
        opened(train=[str(root)])


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed_once_and_broken_ones_skipped(photos, opened, tmp_path):
    shutil.copytree(photos, tmp_path / "far")
    (photos / "linked").symlink_to(tmp_path / "far")
    (photos / "again").symlink_to(tmp_path / "far")
    (photos / "deeper" / "loop").symlink_to(photos)
    (photos / "gone.png").symlink_to("nowhere.png")
    pairs = opened()
    assert len(pairs) == 6 and len(pairs.skipped) == 1 and "gone.png: does not exist" in pairs.skipped[0]


def test_full_disk_is_reported(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(ConfigError, match=r"data.cache: the pixels of 3 .* MB are free\): No space left on device"):
        opened()
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": ["nowhere"]}, "data.train: nowhere does not exist"),
        ({"train": [__file__]}, "data.train: .* is a file, expected a folder"),
        ({"train": ["empty"]}, r"empty holds no image: expected files that end in .png"),
        ({"train": ["broken"]}, r"none of 1 images can be read; the first: .*a\.png"),
        ({"patch": 40}, r"data.patch is 40, that is 80 pixels of an HR image, but 3 images are smaller: .*a\.png"),
    ],
)
def test_errors(opened, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=message):
        opened(**options)


# Patches


def test_lr_and_hr_patches_show_the_same_place(opened):
    lr, hr = Patches(opened(), 16, seed=3, augment=False).batch(0, 64)
    assert lr.shape == (64, 3, 16, 16) and hr.shape == (64, 3, 32, 32) and lr.dtype == torch.uint8
    for small, large in zip(lr, hr, strict=True):  # the middle, without the patch's own border
        reduced = bicubic_resize(large.permute(1, 2, 0).numpy(), 0.5)
        np.testing.assert_array_equal(reduced[4:-4, 4:-4], small.permute(1, 2, 0).numpy()[4:-4, 4:-4])


def test_patches_have_eight_orientations(opened):
    patches = Patches(opened(), 16, seed=3)
    drawn = patches.draw(0, 200)
    assert set(drawn[:, 3]) == set(range(8)) and set(drawn[:, 0]) == {0, 1, 2}
    lr, _ = patches.batch(0, 200)
    for patch, (image, top, left, orientation) in zip(lr, drawn, strict=True):
        expected = patches.pairs.pair(image)[0][top : top + 16, left : left + 16].transpose(2, 0, 1)
        if orientation & 4:
            expected = expected.transpose(0, 2, 1)
        if orientation & (2 if orientation & 4 else 1):
            expected = expected[:, ::-1]
        if orientation & (1 if orientation & 4 else 2):
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(patch, expected)
    plain = Patches(patches.pairs, 16, seed=3, augment=False)
    assert not plain.draw(0, 50)[:, 3].any() and (plain.draw(0, 50)[:, :3] == drawn[:50, :3]).all()


def test_every_place_is_equally_likely(opened):
    pairs = opened()
    drawn = Patches(pairs, 16, seed=0).draw(0, 4000)
    places = (pairs.sizes - 15).prod(axis=1)
    share = np.bincount(drawn[:, 0]) / len(drawn)
    np.testing.assert_allclose(share, places / places.sum(), atol=0.03)
    assert (drawn[:, 1:3] >= 0).all() and (drawn[:, 1:3] + 16 <= pairs.sizes[drawn[:, 0]]).all()
    assert (drawn[:, 1:3].max(axis=0) + 16 >= pairs.sizes.max(axis=0) - 1).all()


def test_patches_depend_on_seed_and_step_alone(opened):
    patches = Patches(opened(), 16, seed=5)
    whole = [torch.cat([lr.flatten(), hr.flatten()]) for lr, hr in load_batches(Batches(patches, 4), 0, 6, 0, False)]
    for workers in (1, 2):
        found = load_batches(Batches(patches, 4), 2, 6, workers, False)
        for (lr, hr), expected in zip(found, whole[2:], strict=True):
            assert torch.equal(torch.cat([lr.flatten(), hr.flatten()]), expected)
    halves = [Batches(patches, 4, rank, 2)[3] for rank in (0, 1)]
    assert torch.equal(torch.cat([lr for lr, _ in halves]), Batches(patches, 4)[3][0])
    assert not torch.equal(Patches(patches.pairs, 16, seed=6).batch(0, 4)[0], patches.batch(0, 4)[0])
    assert patches.names(8, 4) == Batches(patches, 4).names(2)


def test_workers_get_no_copy_of_the_pixels(opened):
    patches = Patches(opened(), 16, seed=5)
    expected = patches.batch(0, 2)
    sent = pickle.dumps(patches)
    assert len(sent) < 10_000 < patches.pairs.pixels.size
    assert torch.equal(pickle.loads(sent).batch(0, 2)[1], expected[1])


def test_images_on_a_gpu_are_cut_by_the_training_process(opened, monkeypatch):
    batches = Batches(Patches(opened(), 16, 0), 4)
    monkeypatch.setattr(batches.patches, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(Patches, "batch", lambda self, first, count: (first, count, os.getpid()))
    assert list(load_batches(batches, 3, 5, workers=2, pin=False)) == [(12, 4, os.getpid()), (16, 4, os.getpid())]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads the memory from Linux")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_constant_over_ten_thousand_steps(opened, workers):
    """Memory not shared with the file of pixels, of this process and its workers together."""
    batches = Batches(Patches(opened(), 16, 0), 8)

    def private_kib():
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        lines = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in ("self", *children))
        return sum(int(line.split()[1]) for of in lines for line in of if line.startswith("Private_Dirty"))

    measured = []
    for step, _ in enumerate(load_batches(batches, 0, 12_000, workers, pin=False), 1):
        if step in (2000, 12_000 - 8):  # while the workers exist
            measured.append(private_kib())
    assert measured[1] - measured[0] < 4096, measured

"""Training images: decoded once, LR of the whole image, patches that depend on the seed and the step alone."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from seemore_fast.errors import ConfigError
from seemore_fast.io.resize import bicubic_resize
from seemore_fast.training.config import Data
from seemore_fast.training.dataset import open_dataset
from seemore_fast.training.patches import Batches, Patches, load_batches


def smooth(rng, height=25, width=35):
    return bicubic_resize(rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8), 5)[:height, :width]


@pytest.fixture
def photos(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "deeper/b.webp", "c.png"):
        Image.fromarray(smooth(rng, *rng.integers(49, 80, 2))).save(folder / name, lossless=True)
    return folder


def opened(photos, tmp_path, scale=2, **options):
    return open_dataset(Data(train=[str(photos)], **{"patch": 16, **options}), scale, tmp_path / "cache")


@pytest.mark.parametrize("scale", [2, 3])
def test_pairs_are_made_of_whole_images(photos, tmp_path, scale):
    images = opened(photos, tmp_path, scale)
    assert [name.removeprefix(f"{photos}/") for name in images.names] == ["a.png", "c.png", "deeper/b.webp"]
    for i, name in enumerate(images.names):
        lr, hr = images.pair(i)
        whole = np.asarray(Image.open(name))
        height, width = (n // scale * scale for n in whole.shape[:2])
        np.testing.assert_array_equal(hr, whole[:height, :width])
        np.testing.assert_array_equal(lr, bicubic_resize(hr, 1 / scale))


def test_images_are_used_at_each_size(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    images = opened(photos, tmp_path, sizes=[1, 0.5], patch=8)
    assert len(images) == 6 and len(images.skipped) == 1
    for i in range(3):
        name = images.names[2 * i]
        assert images.names[2 * i + 1] == name
        half = bicubic_resize(np.asarray(Image.open(name)), 0.5)
        lr, hr = images.pair(2 * i + 1)
        np.testing.assert_array_equal(hr, half[: len(half) // 2 * 2, : half.shape[1] // 2 * 2])
        np.testing.assert_array_equal(lr, bicubic_resize(hr, 0.5))
    assert len(opened(photos, tmp_path, patch=8)) == 3  # another cache
    with pytest.raises(ConfigError, match=r"3 images are smaller: .*, reduce data.patch or increase data.sizes"):
        opened(photos, tmp_path, sizes=[1, 0.375])


def test_a_cache_is_made_once_and_belongs_to_its_files(photos, tmp_path):
    opened(photos, tmp_path)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    opened(photos, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == first and len(first) == 2
    Image.fromarray(smooth(np.random.default_rng(1), 60, 60)).save(photos / "a.png")
    assert opened(photos, tmp_path).pair(0)[1].shape == (60, 60, 3)


def test_damaged_files_are_skipped_and_named(photos, tmp_path):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    images = opened(photos, tmp_path)
    assert len(images) == 3 and len(images.skipped) == 1 and "broken.png" in images.skipped[0]
    assert opened(photos, tmp_path).skipped == images.skipped


def test_patches_show_the_same_place_in_both(photos, tmp_path):
    patches = Patches(opened(photos, tmp_path), 16, seed=3, augment=False)
    lr, hr = patches.batch(0, 64)
    assert lr.shape == (64, 3, 16, 16) and hr.shape == (64, 3, 32, 32) and lr.dtype == torch.uint8
    for small, large in zip(lr, hr, strict=True):  # the middle, where the border of a patch is not seen
        shrunk = bicubic_resize(large.permute(1, 2, 0).numpy(), 0.5)
        np.testing.assert_array_equal(shrunk[4:-4, 4:-4], small.permute(1, 2, 0).numpy()[4:-4, 4:-4])


def test_patches_are_the_images_in_eight_orientations(photos, tmp_path):
    patches = Patches(opened(photos, tmp_path), 16, seed=3)
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


def test_every_place_is_as_likely(photos, tmp_path):
    images = opened(photos, tmp_path)
    drawn = Patches(images, 16, seed=0).draw(0, 4000)
    places = (images.sizes - 15).prod(axis=1)
    share = np.bincount(drawn[:, 0]) / len(drawn)
    np.testing.assert_allclose(share, places / places.sum(), atol=0.03)
    assert (drawn[:, 1:3] >= 0).all() and (drawn[:, 1:3] + 16 <= images.sizes[drawn[:, 0]]).all()
    assert (drawn[:, 1:3].max(axis=0) + 16 >= images.sizes.max(axis=0) - 1).all()


def test_the_order_depends_on_the_seed_and_the_step_alone(photos, tmp_path):
    patches = Patches(opened(photos, tmp_path), 16, seed=5)
    whole = [torch.cat([lr.flatten(), hr.flatten()]) for lr, hr in load_batches(Batches(patches, 4), 0, 6, 0, False)]
    for workers in (1, 2):
        found = load_batches(Batches(patches, 4), 2, 6, workers, False)
        for (lr, hr), expected in zip(found, whole[2:], strict=True):
            assert torch.equal(torch.cat([lr.flatten(), hr.flatten()]), expected)
    halves = [Batches(patches, 4, rank, 2)[3] for rank in (0, 1)]
    assert torch.equal(torch.cat([lr for lr, _ in halves]), Batches(patches, 4)[3][0])
    assert not torch.equal(Patches(patches.pairs, 16, seed=6).batch(0, 4)[0], patches.batch(0, 4)[0])
    assert patches.names(8, 4) == Batches(patches, 4).names(2)


def test_workers_get_no_copy_of_the_pixels(photos, tmp_path):
    patches = Patches(opened(photos, tmp_path), 16, seed=5)
    expected = patches.batch(0, 2)
    sent = pickle.dumps(patches)
    assert len(sent) < 10_000 < patches.pairs.pixels.size
    assert torch.equal(pickle.loads(sent).batch(0, 2)[1], expected[1])


def test_images_on_a_gpu_are_cut_by_the_process_that_trains(photos, tmp_path, monkeypatch):
    steps = Batches(Patches(opened(photos, tmp_path), 16, 0), 4)
    monkeypatch.setattr(steps.patches, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(Patches, "batch", lambda self, first, count: (first, count, os.getpid()))
    assert list(load_batches(steps, 3, 5, workers=2, pin=False)) == [(12, 4, os.getpid()), (16, 4, os.getpid())]


def test_what_a_killed_process_left_is_removed(photos, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    opened(photos, tmp_path)
    (table,) = (tmp_path / "cache").glob("*.json")
    table.unlink()
    left = table.with_suffix(f".{ended.pid}.tmp"), table.with_suffix(f".{os.getppid()}.tmp")
    for path in left:
        path.write_bytes(b"half of the pixels")
    opened(photos, tmp_path)
    assert table.exists() and not left[0].exists() and left[1].exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="asks Linux for the memory")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_over_ten_thousand_steps(photos, tmp_path, workers):
    """What is not shared with the file of pixels, of this process and its workers together."""
    steps = Batches(Patches(opened(photos, tmp_path), 16, 0), 8)

    def taken():
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        lines = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in ("self", *children))
        return sum(int(line.split()[1]) for of in lines for line in of if line.startswith("Private_Dirty"))

    source, after = load_batches(steps, 0, 12_000, workers, pin=False), []
    for step, _ in enumerate(source, 1):
        if step in (2000, 12_000 - 8):  # while the workers are there
            after.append(taken())
    assert after[1] - after[0] < 4096, after  # KiB


def test_given_low_resolution_is_taken(photos, tmp_path):
    lr = tmp_path / "lr"
    for file in photos.rglob("*.*"):
        target = (lr / file.relative_to(photos)).with_name(f"{file.stem}x2.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        hr = np.asarray(Image.open(file))
        Image.fromarray(255 - bicubic_resize(hr[: len(hr) // 2 * 2, : hr.shape[1] // 2 * 2], 0.5)).save(target)
    images = opened(photos, tmp_path, lr=[str(lr)], lr_name="{}x2")
    for i in range(3):
        small, large = images.pair(i)
        np.testing.assert_array_equal(small, 255 - bicubic_resize(large, 0.5))
    expected = r"data.lr: .*lr has not one LR image for 3 of 3 images in .*photos: a.png \(none\), .*; expected "
    for name in ("{}", "{}{}", "{}_{scale}", "deeper/{}x2"):
        with pytest.raises(ConfigError, match=expected) as caught:
            opened(photos, tmp_path, lr=[str(lr)], lr_name=name)
        assert str(caught.value).endswith(f"expected {name} with an image's ending")
    shutil.copy(lr / "ax2.png", lr / "z.png")
    with pytest.raises(ConfigError, match=r"photos has no HR image for 1 images in .*lr: z.png"):
        opened(photos, tmp_path, lr=[str(lr)], lr_name="{}x2")
    (lr / "z.png").rename(lr / "ax2.webp")
    with pytest.raises(ConfigError, match=r"for 1 of 3 images in .*photos: a.png \(ax2.png, ax2.webp\)"):
        opened(photos, tmp_path, lr=[str(lr)], lr_name="{}x2")
    (lr / "ax2.webp").unlink()
    Image.new("RGB", (7, 7)).save(lr / "ax2.png")
    with pytest.raises(ConfigError, match=r"ax2\.png has 7x7 pixels, expected .*, 1/2 of the"):
        opened(photos, tmp_path, lr=[str(lr)], lr_name="{}x2")


def test_low_resolution_beside_the_other_is_not_learnt_from(photos, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(photos, root / "HR")
    shutil.copytree(photos, root / "LR_bicubic" / "X2")
    assert len(opened(root, tmp_path)) == 3  # of HR alone
    (root / "HR").rename(root / "GT")
    with pytest.raises(ConfigError, match=r"data.train: .*set holds LR images among others: LR_bicubic/X2/a, "):
        opened(root, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed_once_and_those_that_lead_nowhere_are_skipped(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "far")
    (photos / "linked").symlink_to(tmp_path / "far")
    (photos / "again").symlink_to(tmp_path / "far")
    (photos / "deeper" / "loop").symlink_to(photos)
    (photos / "gone.png").symlink_to("nowhere.png")
    images = opened(photos, tmp_path)
    assert len(images) == 6 and len(images.skipped) == 1 and "gone.png: does not exist" in images.skipped[0]


def test_a_disk_too_small_for_the_pixels_is_named(photos, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match=r"data.cache: the pixels of 3 .* MB are free\): No space left on device"):
        opened(photos, tmp_path)
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": ["nowhere"]}, "data.train: nowhere does not exist"),
        ({"train": [__file__]}, "data.train: .* is a file, expected a folder"),
        ({"patch": 40}, r"data.patch is 40, that is 80 pixels of an HR image, but 3 images are smaller: .*a\.png"),
    ],
)
def test_what_does_not_fit_is_named(photos, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        open_dataset(Data(**{"train": [str(photos)], **options}), 2, tmp_path / "cache")


def test_a_folder_without_a_readable_image(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"photos holds no image: expected files that end in .png"):
        opened(tmp_path / "photos", tmp_path)
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"none of 1 images can be read; the first: .*a\.png"):
        opened(tmp_path / "photos", tmp_path)

"""Images of a folder side by side: how they share a CPU's threads and its memory, and how they stop."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.images import listing, pixels
from PIL import Image

from seemore_fast import Upscaler
from seemore_fast.upscale import folder as folders
from seemore_fast.upscale.jobs import Jobs


class Watched(Upscaler):
    """Takes its time, and notes with how many threads each image is computed that is computed at the time."""

    running, lock = [], threading.Lock()

    def __call__(self, image, **size):
        threads = torch.get_num_threads()
        with self.lock:
            self.running.append(threads)
            self.seen.append(tuple(self.running))
        time.sleep(0.1)
        try:
            return super().__call__(image, **size)
        finally:
            with self.lock:
                self.running.remove(threads)


@pytest.fixture
def watched(weights):
    """An upscaler on four threads of a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    upscaler = Watched(weights, device="cpu")
    upscaler.seen = []
    yield upscaler
    torch.set_num_threads(threads)


@pytest.fixture
def many(tmp_path):
    """A folder of twelve images."""
    (tmp_path / "many").mkdir()
    for i in range(12):
        Image.fromarray(pixels(3) + i).save(tmp_path / "many" / f"{i}.png")
    return tmp_path / "many"


def all_of(upscaler, many, tmp_path):
    outcomes = list(folders.upscale_files([upscaler], Jobs([many], f"{tmp_path / 'out'}/"), folders.Options()))
    assert len(outcomes) == 12 and not any(outcome.error for outcome in outcomes)
    for i in range(12):
        result = np.asarray(Image.open(tmp_path / "out" / f"{i}_x2.png"))
        np.testing.assert_array_equal(result, Upscaler.__call__(upscaler, pixels(3) + i))


def test_small_images_are_computed_at_once_and_share_the_threads(watched, many, tmp_path):
    all_of(watched, many, tmp_path)
    assert (1, 1, 1, 1) in watched.seen and max(map(sum, watched.seen)) == 4
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == 4


def test_large_images_are_computed_one_at_a_time_with_all_threads(watched, many, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SMALL", 1)
    all_of(watched, many, tmp_path)
    assert watched.seen == [(4,)] * 12


def test_whoever_wants_no_more_gets_no_more(watched, many, tmp_path):
    outcomes = folders.upscale_files([watched], Jobs([many], f"{tmp_path / 'out'}/"), folders.Options())
    next(outcomes)
    outcomes.close()
    there = listing(tmp_path / "out")
    assert len(there) == len(watched.seen) < 12  # what was begun is whole, and nobody goes on
    time.sleep(0.3)
    assert listing(tmp_path / "out") == there
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == 4


def test_few_large_images_are_in_memory_at_once(watched, many, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SMALL", 1)
    there, most, lock = set(), [], threading.Lock()

    def counted(function, change):
        def call(job_or_picture, *arguments):
            with lock:
                change(job_or_picture)
                most.append(len(there))
            return function(job_or_picture, *arguments)

        return call

    monkeypatch.setattr(folders, "_read", counted(folders._read, lambda job: there.add(job.source.stem)))
    write = counted(folders.write_image, lambda picture: None)

    def written(picture, target, quality):
        time.sleep(0.2)  # slower than they are computed
        write(picture, target, quality)
        there.discard(target.stem.removesuffix("_x2"))

    monkeypatch.setattr(folders, "write_image", written)
    all_of(watched, many, tmp_path)
    assert 1 < max(most) <= 3


def test_a_lone_image_has_all_threads(watched, tmp_path):
    Image.fromarray(pixels(3)).save(tmp_path / "a.png")
    list(folders.upscale_files([watched], Jobs([tmp_path / "a.png"], f"{tmp_path / 'out'}/"), folders.Options()))
    assert watched.seen == [(4,)]


def test_stopping_finishes_what_was_begun(watched, tmp_path, many):
    stop, outcomes = threading.Event(), []
    for outcome in folders.upscale_files(
        [watched], Jobs([many], f"{tmp_path / 'out'}/"), folders.Options(), stop.is_set
    ):
        outcomes.append(outcome)
        stop.set()
    # The first, and those that were computed when it was written; those that were only read are not.
    assert 1 <= len(outcomes) == len(watched.seen) <= 8 and not any(outcome.error for outcome in outcomes)
    assert len(listing(tmp_path / "out")) == len(outcomes)

"""Upscaler on frames of videos and animations; its progress and its memory checks."""

from unittest.mock import Mock

import numpy as np
import pytest
from helpers.images import noise
from PIL import Image

from seemore_fast import Upscaler, memory
from seemore_fast.network import engine
from seemore_fast.upscale import runner


@pytest.fixture
def upscaler(small_model):
    return Upscaler(small_model, device="cpu")


def test_frames_come_in_order_and_one_is_read_ahead(upscaler):
    images, asked = [noise(17, 19 + i, 3) for i in range(4)], []

    def source():
        for number, image in enumerate(images):
            asked.append(number)
            yield image

    results = upscaler.frames(source(), outscale=1.5)
    assert not asked  # nothing before anyone asks
    for number, image in enumerate(images):
        np.testing.assert_array_equal(next(results), upscaler(image, outscale=1.5))
        assert max(asked) <= number + 1
    assert list(results) == [] and list(upscaler.frames([])) == []


def test_frames_before_a_failure_are_not_lost(upscaler):
    def source():
        yield noise(17, 19, 3)
        raise OSError("the camera fell")

    results = upscaler.frames(source())
    assert next(results).shape == (34, 38, 3)
    with pytest.raises(OSError, match="the camera fell"):
        next(results)


def test_an_animated_image_is_upscaled_frame_by_frame_or_warned_about(upscaler, tmp_path):
    first, second = (Image.fromarray(noise(17, 19, 3)[::way]) for way in (1, -1))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.gif") as animated:
        frames = list(upscaler.frames(animated))
        assert len(frames) == 2 and all(frame.size == (38, 34) for frame in frames)
        assert np.abs(np.asarray(frames[1]).astype(int) - np.asarray(upscaler(second))).mean() < 20  # a GIF's colours
        animated.seek(0)
        with pytest.warns(UserWarning, match=r"2 frames; only the first is upscaled: see Upscaler\.frames"):
            upscaler(animated)


# Progress and memory


@pytest.mark.parametrize("how", [dict(tta=True), dict(alpha="network"), dict(tta=True, alpha="network", stream=True)])
def test_progress_is_of_the_whole_image(small_model, how):
    shares = []
    Upscaler(small_model, device="cpu", progress=shares.append, **how)(noise(40, 36, 4))
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1) and len(shares) >= (8 if "tta" in how else 2)


def test_what_progress_raises_is_raised(small_model):
    with pytest.raises(KeyError, match="enough"):
        Upscaler(small_model, device="cpu", progress=Mock(side_effect=KeyError("enough")))(noise(20, 20, 3))


@pytest.mark.parametrize(
    ("how", "size", "channels"), [({}, {"outscale": 50}, 3), ({"tta": True}, {}, 3), ({}, {"outscale": 9}, 4)]
)
def test_memory_for_more_than_the_network_is_looked_for_first(small_model, monkeypatch, how, size, channels):
    upscaler, image = Upscaler(small_model, device="cpu", **how), np.zeros((400, 400, channels), np.uint8)
    if engine.unsupported_reason(upscaler.model, upscaler.model.mean) is not None:
        pytest.skip("needs the CPU engine, whose needs are known")
    monkeypatch.setattr(engine, "IN_MEMORY", 0)
    needed = [
        engine.plan_memory(upscaler.model, (1, 3, 400, 400), itemsize=1, streamed=way).memory for way in (False, True)
    ]
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available_memory", lambda: min(needed) + 1000)
    with pytest.raises(MemoryError, match="GiB are available"):
        upscaler(image, **size)
    Upscaler(small_model, device="cpu", stream=True)(image[:, :, :3])  # which alone fits


@pytest.mark.parametrize(("channels", "bytes_made"), [(0, 1), (3, 4)])
def test_pillows_copies_are_counted(small_model, monkeypatch, channels, bytes_made):
    upscaler, image, asked = Upscaler(small_model, device="cpu", stream=True), noise(40, 30, channels or 1), []
    image = image if channels else image[:, :, 0]
    monkeypatch.setattr(runner, "check_memory", lambda needed, what: asked.append(needed))
    np.testing.assert_array_equal(upscaler(image), upscaler(Image.fromarray(image)))
    assert asked[1] - asked[0] == image.nbytes + bytes_made * 80 * 60

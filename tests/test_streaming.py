"""An image whose features do not fit into memory: they lie in a file, and the result is that of the whole image."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.backends import kernels_of, running_on
from helpers.images import noise
from helpers.networks import CASES, network

from seemore_fast import SeemoRe, Upscaler, backends, memory
from seemore_fast.network import engine
from seemore_fast.upscale import runner

pytestmark = pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")
each_cpu = pytest.mark.parametrize("backend", [b for b in kernels_of("network") if b.family == "cpu"])


@pytest.fixture
def low_bands(monkeypatch):
    """Features in a file, and bands of 4 rows, so that a small image has many."""
    monkeypatch.setattr(engine, "IN_MEMORY", 0)
    monkeypatch.setattr(engine, "MAX_BANDS", 0)
    monkeypatch.setattr(engine, "MIN_ROWS", 4)


def image(shape, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    return x if dtype == torch.float32 else (255 * x).to(dtype)


def both(model, x, folder):
    """Return the results of the whole image and of the streamed one."""
    shape = (*x.shape[:2], model.scale * x.shape[2], model.scale * x.shape[3])
    whole, streamed = torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=x.dtype)
    assert engine.run_out(model, x, whole) == engine.run_out(model, x, streamed, folder)
    return whole, streamed


@each_cpu
@pytest.mark.parametrize("case", CASES)
def test_a_streamed_image_is_the_whole_one_to_the_bit(backend, case, low_bands, tmp_path):
    change, shape = CASES[case]
    model = network(**change)
    with running_on(backend, "cpu"):
        for dtype in (torch.float32, torch.uint8):
            whole, streamed = both(model, image(shape, dtype), tmp_path)
            assert torch.equal(whole, streamed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 3, 203, 150), (4, 3, 61, 40)])
def test_any_number_of_threads_and_bands(threads, shape, low_bands, monkeypatch, tmp_path):
    model, before = network(), torch.get_num_threads()
    x = image(shape, torch.float32)
    try:
        torch.set_num_threads(threads)
        for lines in (4, 7, 64, 1000):
            monkeypatch.setattr(engine, "MIN_ROWS", lines)
            whole, streamed = both(model, x, tmp_path)
            assert torch.equal(whole, streamed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_features_stay_in_memory(count, share, low_bands, monkeypatch, tmp_path):
    model, x = network(), image((count, 3, 403, 60), torch.uint8)
    filed = engine.plan_memory(model, x.shape, itemsize=1, streamed=True)
    whole = engine.plan_memory(model, x.shape, itemsize=1)
    monkeypatch.setattr(engine, "IN_MEMORY", int(filed.memory + share * (whole.memory - filed.memory)))
    needs = engine.plan_memory(model, x.shape, itemsize=1, streamed=True)
    assert 0 <= engine.IN_MEMORY - needs.memory < engine.PAGESIZE
    assert 0 < needs.resident == needs.memory - filed.memory == filed.disk - needs.disk
    asked = []
    monkeypatch.setattr(engine, "mapped_buffer", lambda *given: asked.append(given) or memory.mapped_buffer(*given))
    whole, streamed = both(model, x, tmp_path)
    assert torch.equal(whole, streamed)
    assert asked == [(filed.disk, tmp_path, needs.resident)]


def test_an_image_of_nan_leaves_the_next_of_the_batch_alone(low_bands, tmp_path):
    model, x = network(), image((5, 3, 40, 30), torch.float32)
    x[0] = torch.nan
    whole, streamed = both(model, x, tmp_path)
    assert streamed[0].isnan().all() and torch.equal(whole[1:], streamed[1:]) and streamed[1:].isfinite().all()


def test_a_disk_without_room_is_named(monkeypatch, tmp_path):
    model, x = network(), image((1, 3, 40, 30), torch.uint8)
    y = torch.empty(1, 3, 80, 60, dtype=torch.uint8)
    monkeypatch.setattr(engine, "IN_MEMORY", 0)
    usage = memory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"GiB are needed in .* 0\.0 GiB are free: choose a folder on another disk"):
        engine.run_out(model, x, y, tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FileNotFoundError):
        engine.run_out(model, x, y, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free", [None, 4])  # of memory: nobody knows, or in what a run takes
@pytest.mark.parametrize("limit", [2, 0.5])  # of a run in memory, in the same
def test_features_lie_in_a_file_only_where_all_is_large(limit, free, monkeypatch, tmp_path):
    model, x = network(), image((2, 3, 40, 30), torch.uint8)
    taken = engine.plan_memory(model, x.shape, itemsize=1).memory
    filed = []
    monkeypatch.setattr(engine, "mapped_buffer", lambda *asked: filed.append(asked) or memory.mapped_buffer(*asked))
    monkeypatch.setattr(engine, "IN_MEMORY", int(limit * taken))
    monkeypatch.setattr(memory, "available_memory", lambda: free and free * taken)
    both(model, x, tmp_path)
    needs = engine.plan_memory(model, x.shape, itemsize=1, streamed=True)
    assert (needs.disk > 0) == (needs.rows > 0) == bool(filed) == (limit < 1)
    if free:
        monkeypatch.setattr(memory, "available_memory", lambda: 2 * taken - 2)
        assert engine.plan_memory(model, x.shape, itemsize=1, streamed=True).disk > 0


PEAK = """
import sys, torch
from seemore_fast import SeemoRe
from seemore_fast.network import engine

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(2)
engine.IN_MEMORY, engine.MAX_BANDS, engine.MIN_ROWS = int(sys.argv[2]), 0, 64
model = SeemoRe(scale=2, num_experts=3, num_layers=2, embedding_dim=36, lr_space="exp", topk=1)
assert engine.unsupported_reason(model.eval().requires_grad_(False), model.mean) is None
x, y = torch.ones(1, 3, 4000, 1000, dtype=torch.uint8), torch.ones(1, 3, 8000, 2000, dtype=torch.uint8)
engine.run_out(model, x[:, :, :32, :32], y[:, :, :64, :64], sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
engine.run_out(model, x, y, sys.argv[1])
needs = engine.plan_memory(model, x.shape, itemsize=0, streamed=True)
print(needs.memory, needs.disk, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@pytest.mark.parametrize("in_memory", [0, 700_000_000])
def test_the_memory_that_streaming_takes_is_bounded(in_memory, tmp_path):
    """4 megapixels have 1.4 GB of features; what is resident of them is the first, and a few bands."""
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(in_memory)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    said, on_disk, taken = map(int, printed.split())
    assert on_disk > 1.4e9 - in_memory and said < max(200e6, in_memory) and taken < 1.1 * said


# Upscaler, with the engine and with other backends


@pytest.fixture(params=["engine", "other backends"])
def model(request, monkeypatch):
    """SMALL, computed by the engine or by operators."""
    if request.param == "engine":
        request.getfixturevalue("low_bands")
    else:
        monkeypatch.setattr(engine, "unsupported_reason", lambda model, x: "not now")
        monkeypatch.setattr(engine, "MAX_BANDS", 0)
    return network()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "in_chans"), [((70, 50, 3), 3), ((90, 40), 3), ((61, 33, 4), 3), ((7, 30, 3), 3), ((50, 40, 3), 1)]
)
def test_streamed_is_whole(model, shape, in_chans, dtype, tmp_path):
    image, model = noise(*shape, dtype=dtype), network(in_chans=in_chans)
    whole = Upscaler(model, device="cpu")(image)
    streamed = Upscaler(model, device="cpu", stream=True, scratch=tmp_path)(image)
    assert streamed.dtype == whole.dtype
    step = 1 if np.issubdtype(dtype, np.integer) else 1e-5  # an integer may be rounded the other way
    np.testing.assert_allclose(streamed.astype(np.float64), whole.astype(np.float64), rtol=0, atol=step)


def test_images_that_do_not_fit_are_streamed(model, monkeypatch, tmp_path):
    image = noise(80, 60, 3)
    whole = Upscaler(model, device="cpu")(image)
    upscaler = Upscaler(model, device="cpu", scratch=tmp_path)
    monkeypatch.setattr(runner, "_fits", lambda needed, device: False)
    is_engine = engine.unsupported_reason(model, model.mean) is None
    warns = pytest.warns(UserWarning, match=f"60x80 pixels needs .* through a file in {tmp_path}")
    with warns if is_engine else contextlib.nullcontext():
        result = upscaler(image)
    assert np.abs(result.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("fails", [1, 3])
def test_out_of_memory_steps_down(model, monkeypatch, fails):
    """First the whole image fails, then bands, which get lower."""
    if engine.unsupported_reason(model, model.mean) is None:
        pytest.skip("the engine knows its memory in advance")
    image, original, left = noise(80, 60, 3), SeemoRe.first, [fails]
    whole = Upscaler(model, device="cpu")(image)
    monkeypatch.setattr(engine, "MAX_BANDS", 2**30)

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("tried to allocate 3 TiB\nand more")
        return original(self, *arguments)

    monkeypatch.setattr(SeemoRe, "first", failing)
    with pytest.warns(UserWarning, match="3 TiB: streaming the image|again in bands of 48 rows"):
        result = Upscaler(model, device="cpu")(image)
    assert np.abs(result.astype(int) - whole).max() <= 1


def test_features_go_to_a_file_if_the_result_leaves_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    made = []
    monkeypatch.setattr(
        runner, "mapped_buffer", lambda count, folder: made.append(count) or memory.mapped_buffer(count, folder)
    )
    for beside, files in ((10**5, 0), (7 * 10**5, 1)):
        room, _ = runner._feature_buffer((10, 100, 100), torch.uint8, tmp_path, beside)
        assert room.shape == (10, 100, 100) and len(made) == files


def test_progress_grows_to_one(model, tmp_path):
    for stream in (False, True):
        shares = []
        Upscaler(model, device="cpu", stream=stream, scratch=tmp_path, progress=shares.append)(noise(80, 60, 3))
        assert shares == sorted(shares) and shares[-1] == pytest.approx(1) and shares[0] >= 0


def test_streaming_does_not_bypass_hooks():
    model, image, results = network(), noise(40, 30, 3), []
    for stream in (False, True):
        upscaler = Upscaler(model, device="cpu", stream=stream)
        upscaler.model.norm.register_forward_hook(lambda module, inputs, y: 0.5 * y)
        results.append(upscaler(image))
    np.testing.assert_array_equal(*results)
    assert np.abs(results[0].astype(int) - Upscaler(model, device="cpu")(image)).max() > 2

"""An image whose features do not fit into memory: they lie in a file, and the result is that of the whole image."""

import subprocess
import sys

import pytest
import torch
from kit import chosen, each_kernel
from test_network import CASES, network

from seemore_fast import backends, engine, memory

pytestmark = pytest.mark.skipif(backends.why_not("cpu") is not None, reason="no CPU library")
each_cpu = each_kernel("network")


@pytest.fixture
def low_bands(monkeypatch):
    """Bands of 4 lines, so that a small image has many."""
    monkeypatch.setattr(engine, "AT_ONCE", 0)
    monkeypatch.setattr(engine, "LEAST_LINES", 4)


def image(shape, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    return x if dtype == torch.float32 else (255 * x).to(dtype)


def both(model, x, folder):
    """Return the results of the whole image and of the streamed one."""
    shape = (*x.shape[:2], model.scale * x.shape[2], model.scale * x.shape[3])
    whole, streamed = torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=x.dtype)
    assert engine.run_into(model, x, whole) == engine.run_into(model, x, streamed, folder)
    return whole, streamed


@each_cpu
@pytest.mark.parametrize("case", CASES)
def test_a_streamed_image_is_the_whole_one_to_the_bit(backend, case, low_bands, tmp_path):
    change, shape = CASES[case]
    model = network(**change)
    with chosen(backend, "cpu"):
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
            monkeypatch.setattr(engine, "LEAST_LINES", lines)
            whole, streamed = both(model, x, tmp_path)
            assert torch.equal(whole, streamed)
    finally:
        torch.set_num_threads(before)


def test_an_image_of_nan_leaves_the_next_of_the_batch_alone(low_bands, tmp_path):
    model, x = network(), image((5, 3, 40, 30), torch.float32)
    x[0] = torch.nan
    whole, streamed = both(model, x, tmp_path)
    assert streamed[0].isnan().all() and torch.equal(whole[1:], streamed[1:]) and streamed[1:].isfinite().all()


def test_a_disk_without_room_is_named(monkeypatch, tmp_path):
    model, x = network(), image((1, 3, 40, 30), torch.uint8)
    y = torch.empty(1, 3, 80, 60, dtype=torch.uint8)
    usage = memory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"GiB are needed in .* 0\.0 GiB are free: choose a folder on another disk"):
        engine.run_into(model, x, y, tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        engine.run_into(model, x, y, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


PEAK = """
import sys, torch
from seemore_fast import SeemoRe, engine

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(2)
engine.AT_ONCE, engine.LEAST_LINES = 0, 64
model = SeemoRe(scale=2, num_experts=3, num_layers=2, embedding_dim=36, lr_space="exp", topk=1)
assert engine.why_not(model.eval().requires_grad_(False), model.mean) is None
x, y = torch.ones(1, 3, 4000, 1000, dtype=torch.uint8), torch.ones(1, 3, 8000, 2000, dtype=torch.uint8)
engine.run_into(model, x[:, :, :32, :32], y[:, :, :64, :64], sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
engine.run_into(model, x, y, sys.argv[1])
needs = engine.needs(model, x.shape, itemsize=0, streamed=True)
print(needs.memory, needs.disk, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_the_memory_that_streaming_takes_is_bounded(tmp_path):
    """4 megapixels have 1.4 GB of features; what is resident of them is a few bands."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    said, on_disk, taken = map(int, printed.split())
    assert on_disk > 1.4e9 and said < 200e6 and taken < 1.1 * said

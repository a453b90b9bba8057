"""What inference on a CPU takes, and that what cannot fit is refused before anything is allocated."""

import mmap
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.networks import SMALL, T, network

from seemore_fast import SeemoRe, backends, memory
from seemore_fast.network.gpu_memory import gpu_memory_needed, with_oom_hint

pytestmark = pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 10**5, 10**5), torch.float32),
        ((1, 3, 10**5, 10**5), torch.float16),
        ((1, 3, 1, 10**10), torch.float32),
        ((1, 3, 10**9, 10**9), torch.float32),
        ((10**6, 3, 10**6, 10**6), torch.float32),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch, shape, dtype):
    model, x = network(), torch.zeros(1, 3, 1, 1, dtype=dtype).expand(shape)
    rows, columns = (max(size, model.min_size) for size in shape[2:])  # small images are extended
    least = 4 * 12 * rows * columns  # one map of features
    monkeypatch.setattr(memory, "available_memory", lambda: 2**40)
    for name in ("empty", "empty_like", "zeros", "full"):
        monkeypatch.setattr(torch, name, None)
    with pytest.raises(MemoryError, match=r"^x of shape .* upscaled 2x needs [\d,.]+ GiB \(") as refused:
        model(x)
    bytes_needed = int(str(refused.value).split("(")[2].split(" bytes")[0].replace(",", ""))
    assert least < bytes_needed < 100 * least * shape[0]


def test_without_knowledge_of_the_memory_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 0)
    model, x = network(), torch.rand(1, 3, 20, 20)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    model(x)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError):
        model(x)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="asks Linux for the memory")
@pytest.mark.parametrize(("version", "controllers"), [(1, "cpu,memory"), (2, "")])
@pytest.mark.parametrize("path", ["/", "/slice/job"])
def test_the_container_s_limit_counts(monkeypatch, tmp_path, version, controllers, path):
    _, limit, used, (first, second) = memory.CGROUPS[version]
    monkeypatch.setitem(memory.CGROUPS, version, (str(tmp_path), limit, used, (first, second)))
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"4:freezer:/elsewhere\n1:{controllers}:{path}\n")
    free, group = memory.available_memory(), tmp_path / path.strip("/").partition("/")[0]
    group.mkdir(exist_ok=True)  # the group itself, or the one above it

    def told(most, now, pages=""):
        for name, text in {limit: f"{most}\n", used: f"{now}\n", "memory.stat": f"anon 7\n{pages}"}.items():
            (group / name).write_text(text)
        return memory.available_memory()

    assert told(1000, 400) == 600
    assert told(1000, 1400) == 0
    assert told(1000, 900, f"{first} 100\n{second} 200\n") == 400  # pages of files make room
    assert told("max", 400) == pytest.approx(free, rel=0.2)
    told(1000, 400)
    (group / "memory.stat").unlink()
    assert memory.available_memory() == 600  # without knowing of the pages


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no folder in memory")
def test_a_folder_in_memory_takes_memory(monkeypatch, tmp_path):
    assert memory.is_in_memory(Path("/dev/shm")) and not memory.is_in_memory(Path("/proc"))
    monkeypatch.setattr(memory, "is_in_memory", lambda folder: False)
    assert memory.folder_of_large_files() == Path(tempfile.gettempdir())
    monkeypatch.setattr(memory, "is_in_memory", lambda folder: folder != Path("/var/tmp"))
    assert memory.folder_of_large_files() == Path("/var/tmp")
    monkeypatch.setattr(memory, "available_memory", lambda: memory.SMALL)
    with pytest.raises(
        MemoryError, match=f"^what is to wait in {re.escape(str(tmp_path))}, which is in memory itself, needs 0.5 GiB"
    ):
        memory.mapped_buffer(2 * memory.SMALL, tmp_path)


@pytest.mark.skipif(not memory.CAN_STAY_RESIDENT, reason="this system has no memory to put there")
def test_the_first_bytes_of_a_file_may_be_in_memory(monkeypatch, tmp_path):
    page = mmap.PAGESIZE
    usage = memory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: usage._replace(free=2 * page))
    room, release = memory.mapped_buffer(5 * page, tmp_path, resident=3 * page)
    assert len(room) == 5 * page and not room.any() and not list(tmp_path.iterdir())
    room.copy_(torch.arange(5 * page) % 251)
    release(3 * page, 5 * page)
    assert torch.equal(room, (torch.arange(5 * page) % 251).to(torch.uint8))
    if sys.platform == "linux":  # what no file has is lost
        release(0, 5 * page)
        assert not room[: 3 * page].any() and room[3 * page :].any()
    with pytest.raises(OSError, match="GiB are needed"):
        memory.mapped_buffer(6 * page, tmp_path, resident=3 * page)


PEAK = """
import sys, torch
from seemore_fast import SeemoRe
from seemore_fast.network import engine

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

config, shape, threads, dtype = eval(sys.argv[1])
model, x = SeemoRe(**config).eval().requires_grad_(False), torch.zeros(shape, dtype=dtype)
torch.set_num_threads(threads)
y_shape = [*shape[:2], *(config["scale"] * side for side in shape[2:])]
def run(x):
    if dtype == torch.float32:
        return model(x)
    assert engine.unsupported_reason(model, model.mean) is None
    y = torch.empty(y_shape, dtype=dtype)
    engine.run_out(model, x, y)
    return y
run(x[:, :, :16, :16])
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
y = run(x)
print(engine.plan_memory(model, x.shape, itemsize=y.element_size()).memory, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("config", "shape", "threads"),
    [({**T, "scale": 2}, (1, 3, 500, 700), 2), (SMALL, (3, 3, 300, 400), 4), (SMALL, (1, 3, 1500, 400), 1)],
)
def test_memory_is_what_was_said(config, shape, threads, dtype):
    command = [sys.executable, "-c", PEAK, str((config, shape, threads, dtype))]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    said, taken = map(int, printed.split())
    assert taken == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("training", [False, True])
def test_out_of_memory_on_a_gpu_is_explained(training):
    model, x = SeemoRe(**SMALL).requires_grad_(training), torch.rand(2, 3, 40, 50)
    helps = 'model.recompute = "block", a smaller batch or patch' if training else "a smaller image or batch"
    said = rf"x of shape \(2, 3, 40, 50\) needs about [\d.]+ GiB on cpu.*take {helps}, or bfloat16.*allocate 3 TiB$"

    def fail(x):
        raise torch.OutOfMemoryError("tried to allocate 3 TiB\nand a long story")

    with pytest.raises(torch.OutOfMemoryError, match=said) as caught:
        with_oom_hint(fail, model, x)
    assert caught.value.__context__ is None  # which would hold on to memory
    assert with_oom_hint(model, model, x).shape == (2, 3, 80, 100)


def test_memory_on_a_gpu_grows_with_what_is_kept():
    model = SeemoRe(**SMALL)
    needed = {}
    for model.recompute in ("none", "auto", "block"):
        needed[model.recompute] = gpu_memory_needed(model, (8, 3, 64, 64), training=True)
    assert needed["none"] > needed["auto"] > needed["block"] > gpu_memory_needed(model, (8, 3, 64, 64))
    assert gpu_memory_needed(model.bfloat16(), (8, 3, 64, 64)) < 0.8 * needed["block"]

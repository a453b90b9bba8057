"""The CUDA kernels on the CPU (tests/helpers/cuda_host): faults show there, and our kernels have none."""

import json
import math
import os

import pytest
from helpers import cuda_host
from helpers.cuda_host import ORDERS, available, run_python

# The shim, by the kernels of faults.cu: y and x have one element for each thread

BLOCKS, THREADS = 2, 1024
X = list(range(BLOCKS * THREADS))

LAUNCH = """
import ctypes, json, sys
path, kernel, blocks, threads, shared_bytes = sys.argv[1:]
count = int(blocks) * int(threads)
y, x = (ctypes.c_float * count)(), (ctypes.c_float * count)(*range(count))
run = ctypes.CDLL(path).run
run.restype = ctypes.c_char_p
error = run(kernel.encode(), y, x, int(blocks), int(threads), int(shared_bytes))
print(json.dumps([list(y), error and error.decode()]))
"""


def process(kernel: str, order="forward", threads=THREADS, shared_bytes=4 * THREADS, sanitize=False):
    """Launch in a process of its own, which a fault may end."""
    sources = [cuda_host.HERE / "faults.cu"]
    path = available(cuda_host.compile_library, "faults", sources, cuda_host.CACHE, sanitize=sanitize)
    environment = available(cuda_host.asan_environment) if sanitize else dict(os.environ)
    arguments = [path, kernel, BLOCKS, threads, shared_bytes]
    return run_python(LAUNCH, *arguments, environment=environment | {"CUDA_HOST_ORDER": order})


def launch(kernel: str, *arguments, **options) -> tuple[list[float], str | None]:
    """Return y and the error."""
    finished = process(kernel, *arguments, **options)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


EXPECTED = {
    "reverse": [*X[THREADS - 1 :: -1], *X[: THREADS - 1 : -1]],
    "shift": [0 if number % THREADS == 0 else number for number in range(1, len(X) + 1)],
    "warp_sum": [sum(X[number // 32 * 32 :][:32]) for number in X],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kernel", [*EXPECTED, "copy_static", "copy_dynamic", "copy_global_from", "copy_global_to", "leave"]
)
def test_right_kernels(kernel, order):
    assert launch(kernel, order) == [EXPECTED.get(kernel, X), None]


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_before_reading(order):
    y, error = launch("reverse without barrier", order)
    assert error is None
    assert sum(map(math.isnan, y)) >= 2 * BLOCKS
    assert y != EXPECTED["reverse"]


def test_missing_barrier_before_writing():
    """Shared memory is written everywhere, so nothing is NaN; in one order the result is even right."""
    results = {order: launch("shift without barrier", order) for order in ORDERS}
    assert results["forward"] == [EXPECTED["shift"], None]
    for order in ("backward", "shuffled"):
        y, error = results[order]
        assert error is None
        assert y != EXPECTED["shift"]


@pytest.mark.parametrize("memory", ["static", "dynamic"])
def test_uninitialised_shared_memory_is_nan_in_every_block(memory):
    """The first block writes all elements, and the second, which writes 1000, does not find them."""
    y, error = launch(f"copy_{memory} uninitialised")
    assert error is None
    assert y[: THREADS + 1000] == X[: THREADS + 1000]
    assert len(y) == 2 * THREADS
    assert all(map(math.isnan, y[THREADS + 1000 :]))


@pytest.mark.parametrize("kernel", ["leave before a barrier", "warp_sum of some lanes", "divergent barriers"])
def test_threads_that_do_not_meet(kernel):
    _, error = launch(kernel)
    assert error == "kernel: threads wait at different barriers, or some left before one"


def test_shuffles_of_a_mask_end_the_process():
    finished = process("warp_sum with a mask")
    assert finished.returncode < 0
    assert "a shuffle of some lanes only is not supported" in finished.stderr


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1025}, {"shared_bytes": 48 * 1024 + 1}], ids=str)
def test_launches_that_cuda_refuses(options):
    assert launch("copy_static", **options)[1] == "kernel: invalid configuration argument"


def test_unknown_orders_are_refused():
    assert launch("copy_static", "sideways")[1] == "CUDA_HOST_ORDER is sideways, expected forward, backward or shuffled"


@pytest.mark.parametrize("kernel", ["copy_static", "copy_dynamic", "copy_global_from", "copy_global_to"])
def test_out_of_bounds(kernel):
    """AddressSanitizer lets the right twin pass and reports the fault, in the kernel."""
    assert launch(kernel, sanitize=True) == [X, None]
    finished = process(f"{kernel} out of bounds", sanitize=True)
    assert finished.returncode != 0
    assert "ERROR: AddressSanitizer: " in finished.stderr
    kind = "global" if kernel == "copy_static" else "heap"
    assert f"{kind}-buffer-overflow" in finished.stderr
    assert "WRITE of size 4" in finished.stderr if kernel.endswith("to") else "READ of size 4" in finished.stderr
    assert f" in {kernel}" in finished.stderr or f"::{kernel}" in finished.stderr


@pytest.mark.parametrize("kernel", ["reverse", "shift", "warp_sum"])
def test_fibers_under_address_sanitizer(kernel):
    finished = process(kernel, sanitize=True)
    assert finished.stderr == ""
    assert json.loads(finished.stdout) == [EXPECTED[kernel], None]


# The library


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(cuda_host.Unavailable, match=r"^no g\+\+ on PATH"):
        cuda_host.library()


def test_headers_are_those_of_cuda_home(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_bf16.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_host.cuda_headers() == tmp_path / "include"


def test_a_changed_source_is_compiled_again(tmp_path):
    source, folder = tmp_path / "answer.cu", tmp_path / "cache"
    source.write_text("int answer() { return 1; }")
    first = available(cuda_host.compile_library, "answer", [source], folder)
    written = first.stat().st_mtime_ns
    assert cuda_host.compile_library("answer", [source], folder) == first
    assert first.stat().st_mtime_ns == written
    source.write_text("int answer() { return 2; }")
    second = cuda_host.compile_library("answer", [source], folder)
    assert list(folder.iterdir()) == [second] != [first]


def test_an_error_of_the_compiler_is_shown(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("int answer() { return question; }")
    available(cuda_host.cuda_headers)
    with pytest.raises(RuntimeError, match="was not declared in this scope"):
        cuda_host.compile_library("wrong", [source], tmp_path)

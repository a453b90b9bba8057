"""The CUDA kernels on the CPU (tests/helpers/cuda_host): faults show there, and our kernels have none."""

import json
import math
import os
from pathlib import Path

import helpers.backends
import pytest
import torch
from helpers import cuda_host
from helpers.backends import running_on
from helpers.cuda_host import ORDERS, available, load, run_python
from helpers.cuda_host.strips import STRIPS, WALKS, walk
from helpers.ops import cast, random_parameters, striped_shapes
from torch import Tensor

from seemore_fast import ops, reference

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


# striped_conv. Values and gradients: test_striped_conv.py, backend cuda_host.


@pytest.fixture(scope="module")
def operators():
    return load(available(cuda_host.library))


def striped_tensors(shape: tuple[int, ...], taps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"x": shape, "gate": shape, "dy": shape, **striped_shapes(shape[1], taps)}
    return cast(random_parameters(shapes, "cpu"), dtype)


def run_striped_conv(operators, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all results; those that are images lie in larger tensors of NaN, whose margins stay NaN."""
    tensors = dict(tensors)
    gradients = parameter_gradients(tensors)
    x, gate, dy = (tensors.pop(name) for name in ("x", "gate", "dy"))
    larger = {name: x.new_full([size + 2 for size in x.shape], torch.nan) for name in ("y", "dx", "dgate")}
    inside = (slice(1, -1),) * x.dim()
    results = {name: tensor[inside] for name, tensor in larger.items()}
    operators.striped_conv(results["y"], x, *tensors.values(), True, gate)
    outputs = [results["dx"], results["dgate"], *gradients.values()]
    operators.striped_conv_backward(*outputs, dy, x, *tensors.values(), True, gate)
    results = {name: tensor.clone() for name, tensor in results.items()}
    for name, tensor in larger.items():
        tensor[inside] = torch.nan
        assert tensor.isnan().all(), f"wrote beside {name}"
    return results | gradients


def parameter_gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return room for the gradients of all weights and biases, full of NaN."""
    return {f"d{name}": torch.full_like(t, torch.nan) for name, t in tensors.items() if name[:4] in ("weig", "bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, taps", [((2, 3, 40, 70), 11), ((1, 2, 17, 33), 7), ((2, 2, 5, 6), 3)], ids=str)
def test_striped_conv_does_not_depend_on_the_order_of_threads(operators, monkeypatch, shape, taps, dtype):
    results = []
    for order in [*ORDERS, "shuffled"]:
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        results.append(run_striped_conv(operators, striped_tensors(shape, taps, dtype)))
    for name, first in results[0].items():
        assert first.isfinite().all(), name
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("dim", range(4))
def test_striped_conv_offsets_beyond_32_bits(operators, tmp_path, dim):
    """Images in a file with a hole of 4 GB: the two halves along `dim` lie before and behind it."""
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, 2**32 + 2**12)
    memory = torch.from_file(str(file), shared=True, size=2**31 + 2**11, dtype=torch.bfloat16)
    tensors = striped_tensors((2, 2, 2, 2), 3, torch.bfloat16)
    expected = run_striped_conv(operators, tensors)
    strides = [8, 4, 2, 1]
    strides[dim] = 2**31 + 1024
    names = ["x", "gate", "dy", "y", "dx", "dgate"]
    far = {name: memory.as_strided((2, 2, 2, 2), strides, 16 * number) for number, name in enumerate(names)}
    for name in names[:3]:
        far[name].copy_(tensors.pop(name))
    x, gate, dy, y, dx, dgate = far.values()
    operators.striped_conv(y, x, *tensors.values(), True, gate)
    gradients = parameter_gradients(tensors)
    operators.striped_conv_backward(dx, dgate, *gradients.values(), dy, x, *tensors.values(), True, gate)
    far |= gradients
    for name, value in expected.items():
        assert torch.equal(far[name], value), name


@pytest.mark.parametrize(
    "shape, taps, message",
    [
        ((1, 1, 3, 3), 33, "weight_row has 33 taps, expected 3, 7 or 11"),
        ((70_000, 70_000, 1, 1), 3, "a grid of 4900000000 blocks, expected at most 2147483647"),
        ((1, 1, 2**31, 1), 3, "an image of 2147483648 x 1, expected sides below"),
    ],
    ids=str,
)
def test_striped_conv_refuses_what_it_cannot_launch(operators, shape, taps, message):
    image = torch.zeros(1, 1, 1, 1).expand(shape)
    parameters = [torch.zeros(size) for size in striped_shapes(shape[1], taps).values()]
    with pytest.raises(RuntimeError, match=message):
        operators.striped_conv(image, image, *parameters, False, None)


SANITIZED_SHAPES = [(2, 3, 17, 33), (1, 2, 16, 32), (1, 2, 3, 70), (0, 2, 3, 4), (1, 1, 40, 1), (1, 1, 1, 1)]


def run_sanitized(path: str, short: str) -> None:
    """In a process of its own: y as the reference has it. `short` names a tensor to make one column too narrow."""
    operators = load(Path(path))
    for shape in SANITIZED_SHAPES:
        for taps in (3, 7, 11):
            tensors = striped_tensors(shape, taps, torch.float32)
            inputs = {name: tensor for name, tensor in tensors.items() if name != "dy"}
            expected = reference.striped_conv(**inputs, activation="gelu")
            if short:
                tensors[short] = tensors[short][..., :-1].contiguous()
            y = run_striped_conv(operators, tensors)["y"]
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    print("clean")


@pytest.mark.parametrize("short", ["", pytest.param("gate", marks=pytest.mark.slow)])
def test_striped_conv_under_address_sanitizer(short):
    """It is clean; and not because nothing is ever found: where a tensor is too short, that is reported."""
    path = available(cuda_host.library, sanitize=True)
    code = "import sys, test_cuda_host; test_cuda_host.run_sanitized(*sys.argv[1:])"
    finished = run_python(code, path, short, environment=available(cuda_host.asan_environment))
    if short:
        assert "heap-buffer-overflow" in finished.stderr
        assert finished.returncode != 0
    else:
        assert (finished.stdout, finished.returncode) == ("clean\n", 0), finished.stderr


# The operators that sweep over images (csrc/cuda/common/sweep.h). Values and gradients: their own tests.


@pytest.mark.parametrize("shape", STRIPS.values(), ids=STRIPS)
@pytest.mark.parametrize("name, taps", WALKS)
def test_walks_do_not_depend_on_the_order_of_threads(operators, monkeypatch, name, taps, shape):
    results = []
    for order in ORDERS:
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        with running_on("cuda_host", "cpu"):
            results.append(walk(name, shape, taps, torch.float32))
    for what, first in results[0].items():
        assert first.isfinite().all(), what
        assert all(torch.equal(first, other[what]) for other in results[1:]), what


def run_walks(path: str) -> None:
    """In a process of its own, with that library in place of the one which tests load."""
    helpers.backends._load_host_library = lambda: load(Path(path))
    with running_on("cuda_host", "cpu"):
        for name, taps in WALKS:
            for shape in STRIPS.values():
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    results = walk(name, shape, taps, dtype)
                    assert all(result.isfinite().all() for result in results.values())
        x, *parameters = (torch.randn(s) for s in ((2, 3, 45, 70), *striped_shapes(3, 3).values()))
        ops.striped_conv_router(x, *parameters, torch.randn(4, 3), 2)
    print("clean")


def test_walks_under_address_sanitizer():
    path = available(cuda_host.library, sanitize=True)
    code = "import sys, test_cuda_host; test_cuda_host.run_walks(*sys.argv[1:])"
    finished = run_python(code, path, environment=available(cuda_host.asan_environment))
    assert (finished.stdout, finished.returncode) == ("clean\n", 0), finished.stderr


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("striped_conv", {"weight_row": (3, 1, 1, 4)}, "weight_row has 4 taps, expected 3, 7 or 11"),
        ("striped_conv", {"weight_col": (3, 1, 3, 1)}, r"weight_col has shape \(3, 1, 3, 1\), expected \(3, 1, 7, 1\)"),
        ("striped_conv", {"bias_row": (4,)}, r"bias_row has shape \(4\), expected \(3\)"),
        ("striped_conv", {"y": (2, 3, 4, 6)}, r"y has shape \(2, 3, 4, 6\), expected \(2, 3, 4, 5\)"),
        ("striped_conv", {"x": (3, 4, 5)}, r"x has 3 dimensions, expected 4: \(B, C, H, W\)"),
        ("striped_conv", {"bias_col": torch.bfloat16}, "bias_col has another dtype, expected that of x"),
        ("striped_conv", {"y": torch.float16}, "y has another dtype, expected that of x"),
        ("striped_conv", {"x": torch.int32}, "x has another dtype, expected float32, float64, float16 or bfloat16"),
        ("striped_conv", {"weight_row": "meta"}, "weight_row is on another device, expected that of x"),
        ("striped_conv", {"x": "meta"}, "x is on another kind of device, expected a CPU tensor"),
        ("striped_conv", {"x": torch.float64}, "x is float64, expected float32, float16 or bfloat16"),
    ],
    ids=str,
)
def test_callers_of_the_library_are_told_what_is_wrong(operators, name, wrong, message):
    shapes = {"y": (2, 3, 4, 5), "x": (2, 3, 4, 5), **striped_shapes(3, 7)}
    tensors = {tensor: torch.zeros(shape) for tensor, shape in shapes.items()}
    for tensor, value in wrong.items():
        tensors[tensor] = torch.zeros(value) if isinstance(value, tuple) else tensors[tensor].to(value)
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(operators, name)(*tensors.values(), None, None)

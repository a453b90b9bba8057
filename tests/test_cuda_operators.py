"""The CUDA operators on the host: threads in any order, large offsets, and AddressSanitizer.

Values, gradients and refusals: test_conformance.py and test_raw_operators.py, backend cuda_host.
"""

import os
from pathlib import Path

import helpers.backends
import pytest
import torch
from helpers import cuda_host
from helpers.backends import recorded_calls, running_on
from helpers.cases import grid
from helpers.cuda_host import ORDERS, available, load, run_python
from helpers.cuda_host.strips import STRIPS
from helpers.ops import LAYOUTS, assert_same, cast, striped_shapes, value_and_gradients
from helpers.table import BFLOAT, BY_NAME, FLOAT, HALF

SHAPES = [*STRIPS.values(), (2, 3, 40, 70), (1, 2, 17, 33), (2, 2, 5, 6)]
EXAMPLES = {
    "striped_conv": grid({"shape": SHAPES, "taps": [3, 7, 11]}, activation="gelu"),
    "striped_conv_router": grid(shape=(2, 3, 45, 70), experts=4),
    "calibrate": grid({"shape, recursive": [((2, 3, 41, 70), 1), ((2, 3, 38, 72), 2), ((1, 1, 64, 66), 3)]}),
    "router": grid({"layout": [None, "channels_last", "slice"]}, shape=(2, 20, 30, 36)),
}
# for AddressSanitizer, of more sizes
SANITIZED = {
    "striped_conv": [(2, 3, 17, 33), (1, 2, 16, 32), (1, 2, 3, 70), (0, 2, 3, 4), (1, 1, 40, 1), (1, 1, 1, 1)],
    "striped_conv_router": [(2, 3, 17, 33)],
    "calibrate": [(2, 3, 9, 14), (0, 3, 9, 14), (1, 1, 4, 4), (1, 50, 6, 16)],
    "router": [(2, 3, 17, 33), (1, 4, 16, 32), (0, 2, 3, 4), (1, 1, 1, 1), (2, 36, 5, 7), (1, 1, 1, 9001)],
}


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(
    "name, example",
    [pytest.param(name, e, id=f"{name}-{e}") for name, examples in EXAMPLES.items() for e in examples],
)
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch, name, example, dtype):
    case, results = BY_NAME[name], []
    tensors, options = case.call("cpu", dtype, **example.given)
    with running_on("cuda_host", "cpu"):
        for order in [*ORDERS, "shuffled"]:
            monkeypatch.setenv("CUDA_HOST_ORDER", order)
            results.append(value_and_gradients(case.run, tensors, **options))
    assert all(value.isfinite().all() for value in results[0].values())
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("dim", range(3))  # not along rows, whose pixels must be neighbours
def test_offsets_beyond_32_bits(tmp_path, dim):
    """Images in a file with a hole of 4 GB: the two halves along `dim` lie before and behind it."""
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, 2**32 + 2**12)
    memory = torch.from_file(str(file), shared=True, size=2**31 + 2**11, dtype=BFLOAT)
    strides = [8, 4, 2, 1]
    strides[dim] = 2**31 + 1024
    case = BY_NAME["striped_conv"]
    tensors, options = case.call("cpu", BFLOAT, shape=(2, 2, 2, 2), taps=3, activation="gelu")
    with running_on("cuda_host", "cpu"), recorded_calls() as recorded:
        value_and_gradients(case.run, tensors, **options)
    assert len(recorded) == 2
    for function, arguments in recorded:
        far = list(arguments)
        for number, value in enumerate(arguments):
            if isinstance(value, torch.Tensor):
                is_image = value.shape == tensors["x"].shape
                room = memory.as_strided(value.shape, strides, 16 * number) if is_image else torch.empty_like(value)
                far[number] = room.copy_(value)
        function(*far)
        assert all(torch.equal(a, b) for a, b in zip(arguments, far, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize(
    "shape, taps, message",
    [
        ((1, 1, 3, 3), 33, "weight_row has 33 taps, expected 3, 7 or 11"),
        ((70_000, 70_000, 1, 1), 3, "a grid of 4900000000 blocks, expected at most 2147483647"),
        ((1, 1, 2**31, 1), 3, "an image of 2147483648 x 1, expected sides below"),
        ((1, 3, 3), 3, r"x has 3 dimensions, expected 4: \(B, C, H, W\)"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_launch(shape, taps, message):
    image = torch.zeros((1,) * len(shape)).expand(shape)
    parameters = [torch.zeros(size) for size in striped_shapes(shape[1], taps).values()]
    with running_on("cuda_host", "cpu"), pytest.raises(RuntimeError, match=message):
        torch.ops.seemore_cuda_host.striped_conv(image, image, *parameters, None, None)


def test_refuses_rows_of_pixels_that_lie_apart():
    x = torch.zeros(2, 3, 4, 5)
    gate, parameters = x.to(memory_format=torch.channels_last), [torch.zeros(s) for s in striped_shapes(3, 3).values()]
    message = "an image with a stride of 3 between the pixels of a row, expected 1"
    with running_on("cuda_host", "cpu"), pytest.raises(RuntimeError, match=message):
        torch.ops.seemore_cuda_host.striped_conv(x.clone(), x, *parameters, None, gate)


def run_sanitized(path: str, how: str) -> None:
    """In a process of its own, with that library, by all examples or those that take each of their values in turn.

    Or by one whose `gate` has less memory than it should.
    """
    helpers.backends._load_host_library = lambda: load(Path(path))
    for name, shapes in SANITIZED.items():
        for example in EXAMPLES[name] + grid({"shape": shapes, "layout": [None, *LAYOUTS]}):
            for dtype in (FLOAT, BFLOAT, HALF):
                if how == "all" or not (example.is_extra or dtype == HALF):
                    check_sanitized(BY_NAME[name], *BY_NAME[name].call("cpu", dtype, **example.given), how)
    print("clean")


def check_sanitized(case, tensors, options, how):
    expected = case.baseline(**cast(tensors, torch.float32), **options)
    if how == "short gate" and "gate" in tensors:
        x = tensors["gate"] = tensors["gate"].clone()
        x.untyped_storage().resize_((x.numel() - 1) * x.element_size())
    with running_on("cuda_host", "cpu"):
        found = value_and_gradients(case.run, tensors, **options)
    torch.testing.assert_close(found["y"].float(), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(
    "how", ["in turn", *(pytest.param(how, marks=pytest.mark.slow) for how in ("all", "short gate"))]
)
def test_under_address_sanitizer(how):
    """It is clean; and not because nothing is ever found: where a tensor is too short, that is reported."""
    path = available(cuda_host.library, sanitize=True)
    code = "import sys, test_cuda_operators; test_cuda_operators.run_sanitized(*sys.argv[1:])"
    finished = run_python(code, path, how, environment=available(cuda_host.asan_environment))
    if how == "short gate":
        assert "heap-buffer-overflow" in finished.stderr
        assert finished.returncode != 0
    else:
        assert (finished.stdout, finished.returncode) == ("clean\n", 0), finished.stderr

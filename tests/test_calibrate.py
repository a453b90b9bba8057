"""calibrate: k + a smooth map of its surroundings."""

from pathlib import Path

import pytest
import torch
from helpers import cuda_host
from helpers.backends import each_backend, each_kernel, running_on, usable
from helpers.faults import assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_calibrate, naive_gelu
from helpers.ops import (
    LAYOUTS,
    assert_close_to_naive,
    assert_compiles,
    assert_deterministic,
    assert_gradcheck,
    assert_images_are_alone,
    assert_large_offsets,
    assert_opcheck,
    assert_refuses_double_backward,
    assert_within_yardstick,
    assert_writes_its_results_only,
    calibrate_shapes,
    cast,
    each_layout,
    each_narrow_dtype,
    largest_difference,
    random_parameters,
    value_and_gradients,
)

from seemore_fast import reference
from seemore_fast.ops import calibrate

each_case = pytest.mark.parametrize(
    "shape, recursive",
    [
        ((1, 1, 4, 4), 1),  # a small map of one pixel
        ((2, 3, 5, 7), 1),  # what 4x4 blocks do not cover is dropped, the map is stretched over it
        ((0, 3, 5, 7), 1),
        ((1, 5, 4, 31), 1),
        ((1, 36, 9, 8), 1),
        ((1, 1, 16, 16), 2),
        ((2, 3, 17, 31), 2),
        ((1, 4, 35, 66), 2),
        ((1, 2, 64, 69), 3),
    ],
    ids=str,
)
each_written = pytest.mark.parametrize(
    "shape, recursive, layout",
    [
        ((2, 9, 21, 16), 1, None),
        ((2, 9, 21, 18), 1, "channels_last"),
        ((2, 3, 35, 48), 2, None),
        ((1, 2, 68, 66), 3, None),
        ((1, 50, 4, 4), 1, None),
    ],
    ids=str,
)


def tensors_of(device, shape=(2, 3, 9, 14)):
    return random_parameters({"k": shape} | calibrate_shapes(shape[1]), device)


@each_backend("calibrate")
@each_case
def test_values(backend, device, shape, recursive):
    tensors = tensors_of(device, shape)
    assert_close_to_naive(backend, calibrate, naive_calibrate, tensors, recursive=recursive)


@each_backend("calibrate")
@each_layout
@pytest.mark.parametrize("shape, recursive", [((2, 3, 9, 14), 1), ((2, 3, 17, 20), 2)], ids=str)
def test_layouts(backend, device, layout, shape, recursive):
    tensors = tensors_of(device, shape)
    assert_close_to_naive(backend, calibrate, naive_calibrate, tensors, layout, recursive=recursive)


@each_backend("calibrate")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("recursive", [1, 2])
def test_narrow_dtypes(backend, device, dtype, layout, recursive):
    tensors = tensors_of(device, (2, 8, 33, 35))
    assert_within_yardstick(backend, calibrate, naive_calibrate, tensors, dtype, layout, recursive=recursive)


@each_backend("calibrate", interpreted=False, dtype=torch.float64)
@pytest.mark.parametrize("shape, recursive", [((2, 2, 5, 9), 1), ((1, 1, 16, 18), 2)], ids=str)
def test_gradcheck(backend, device, shape, recursive):
    with running_on(backend, device):
        assert_gradcheck(calibrate, tensors_of(device, shape), recursive=recursive)


@each_backend("calibrate")
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(calibrate, tensors_of(device), tensors_of(device, (3, 3, 11, 17)), recursive=1)


@each_kernel("calibrate", interpreted=False)
@pytest.mark.parametrize(
    "shape, recursive, dtype",
    [
        ((1, 50, 4, 12), 1, torch.float64),  # the C x C matrix in squares of 48
        ((3, 97, 8, 5), 1, torch.float64),
        ((1, 1, 4, 1100), 1, torch.float64),  # more columns than a block's threads hold at once
        ((1, 1, 5, 2101), 1, torch.float64),  # and than its sums
        ((1, 2, 64, 2064), 2, torch.float64),
        ((1, 1, 376, 364), 1, torch.float64),  # more pixels of the small map than parts
        ((4, 132, 16, 144), 1, torch.float64),  # several patches for a thread
        ((4, 132, 16, 144), 2, torch.bfloat16),
        ((1, 3, 128, 192), 3, torch.float32),
    ],
    ids=str,
)
def test_more_than_one_block(backend, device, shape, recursive, dtype):
    tensors = tensors_of(device, shape)
    if dtype == torch.float64:
        assert_close_to_naive(backend, calibrate, naive_calibrate, tensors, recursive=recursive)
    else:
        assert_within_yardstick(backend, calibrate, naive_calibrate, tensors, dtype, recursive=recursive)


@each_kernel("calibrate", interpreted=False)
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "slice"])
@pytest.mark.parametrize("shape, recursive", [((2, 3, 18, 32), 1), ((1, 3, 37, 72), 2)], ids=str)
def test_rows_of_packs(backend, device, dtype, layout, shape, recursive):
    """Rows of 16 or 8 bytes' multiples are read so; those inside a larger tensor are not aligned."""
    tensors = tensors_of(device, shape)
    assert_within_yardstick(backend, calibrate, naive_calibrate, tensors, dtype, layout, recursive=recursive)


@each_kernel("calibrate")
def test_opcheck(backend, device):
    with running_on(backend, device):
        assert_opcheck(calibrate, tensors_of(device), recursive=1)
        channels_last = {name: LAYOUTS["channels_last"](t) for name, t in tensors_of(device).items()}
        assert_opcheck(calibrate, channels_last, recursive=1)


@each_kernel("calibrate")
@each_written
def test_writes_its_results_only(backend, device, shape, recursive, layout):
    tensors = tensors_of(device, shape)
    if layout:
        tensors = {name: LAYOUTS[layout](t) for name, t in tensors.items()}
    with running_on(backend, device):
        assert_writes_its_results_only(calibrate, tensors, recursive=recursive)


@each_backend("calibrate")
def test_large_offsets(backend, device):
    tensors = cast(tensors_of(device, (2, 2, 5, 8)), torch.bfloat16)
    with running_on(backend, device):
        assert_large_offsets(calibrate, tensors, ["k"], recursive=1)


@each_kernel("calibrate", interpreted=False)
def test_deterministic(backend, device):
    tensors = cast(tensors_of(device, (2, 3, 70, 40)), torch.float32)
    with running_on(backend, device):
        assert_deterministic(calibrate, tensors, recursive=2)


@each_kernel("calibrate", interpreted=False)
@pytest.mark.parametrize("shape, recursive", [((2, 3, 9, 14), 1), ((3, 2, 32, 64), 2)], ids=str)
def test_images_are_alone(backend, device, shape, recursive):
    with running_on(backend, device):
        tensors = cast(tensors_of(device, shape), torch.float32)
        assert_images_are_alone(calibrate, tensors, recursive=recursive)


@each_kernel("calibrate", interpreted=False)
@pytest.mark.parametrize(
    "shape, recursive, layout", [((1, 1, 1100, 5), 1, None), ((1, 20, 8, 9), 1, "channels_last")], ids=str
)
def test_tiles_of_the_cpu(backend, device, shape, recursive, layout):
    """Bands of 256 rows of the first aggregation, and of 1024 pixels of the small map; 16 channels side by side."""
    tensors = tensors_of(device, shape)
    assert_close_to_naive(backend, calibrate, naive_calibrate, tensors, layout, recursive=recursive)


@each_backend("calibrate")
def test_double_backward(backend, device):
    tensors = tensors_of(device, (1, 1, 4, 5))
    with running_on(backend, device):
        if backend == "reference":
            assert torch.autograd.gradgradcheck(
                lambda k: calibrate(**tensors | {"k": k}, recursive=1), tensors["k"].requires_grad_(), nondet_tol=1e-10
            )
        else:
            assert_refuses_double_backward(calibrate, tensors, recursive=1)


@each_backend("calibrate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(backend, device, dtype):
    """y has k's dtype, as the reference's; gradients have their own; y errs at most twice as much."""
    tensors = cast(tensors_of(device), torch.float32)
    tensors["k"] = tensors["k"].to(dtype)
    truth = naive_calibrate(**cast(tensors, torch.float64), recursive=1)
    with torch.autocast(device, torch.bfloat16):
        expected = reference.calibrate(**tensors, recursive=1)
        with running_on(backend, device):
            found = value_and_gradients(calibrate, tensors, recursive=1)
            with pytest.raises(TypeError, match=r"^calibrate: weight_agg has dtype torch.float32, expected .*float64"):
                calibrate(**tensors | {"k": tensors["k"].double()}, recursive=1)
    assert found["y"].dtype == expected.dtype == dtype
    assert largest_difference(found["y"], truth) <= 2 * largest_difference(expected, truth)
    assert all(found[f"gradient of {name}"].dtype == tensor.dtype for name, tensor in tensors.items())


@each_kernel("calibrate")
@pytest.mark.parametrize("recursive", [1, 2])
def test_extreme_values(backend, device, recursive, monkeypatch):
    """Infinities and NaN come out where the formula has them; what is not gathered stays where it is."""
    tensors = cast(tensors_of(device, (2, 2, 37, 50)), torch.float32)
    tensors["k"][0, 0, 9, 20] = torch.inf
    tensors["k"][1, 1, 3, 30] = torch.nan
    tensors["k"][:, :, 36] = torch.nan
    with monkeypatch.context() as patch:  # torch's own GELU of infinity is infinity or NaN, as the processor has it
        patch.setattr(torch.nn.functional, "gelu", naive_gelu)
        expected = value_and_gradients(reference.calibrate, tensors, recursive=recursive)
    with running_on(backend, device):
        found = value_and_gradients(calibrate, tensors, recursive=recursive)
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, equal_nan=True, rtol=1e-4, atol=1e-4)


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, calibrate, tensors_of(device), recursive=1)


def test_bad_sizes(device):
    assert_sizes_refused(calibrate, tensors_of(device), [("k", 0), ("k", 2), ("k", 3)], recursive=1)


def test_another_device_is_refused(device):
    tensors = tensors_of(device)
    tensors["bias_pw"] = tensors["bias_pw"].to("meta")
    with pytest.raises(ValueError, match=f"^calibrate: bias_pw is on meta, expected {device}.*, where k is"):
        calibrate(**tensors, recursive=1)


@pytest.mark.parametrize("height, width, recursive", [(3, 4, 1), (4, 3, 1), (15, 16, 2), (16, 15, 2), (63, 64, 3)])
def test_too_small_images_are_refused(device, height, width, recursive):
    least = 4**recursive
    with pytest.raises(
        ValueError, match=f"^calibrate: k is {height}x{width} pixels, expected at least {least}x{least}"
    ):
        calibrate(**tensors_of(device, (1, 3, height, width)), recursive=recursive)


@pytest.mark.parametrize("recursive", [0, -1, 1.0, "1", None])
def test_bad_recursive_is_refused(device, recursive):
    with pytest.raises(ValueError, match=f"^calibrate: recursive is {recursive!r}, expected an integer of at least 1"):
        calibrate(**tensors_of(device), recursive=recursive)


# The library's operators themselves, on the host


@pytest.fixture(scope="module")
def operators():
    if usable()["cuda_host"]:
        pytest.skip(usable()["cuda_host"])
    with running_on("cuda_host", "cpu"):
        return torch.ops.seemore_cuda_host


def raw_arguments(shape=(2, 3, 9, 14), recursive=1, dtype=torch.float32):
    """y and, in this order, the arguments of calibrate_backward; full of NaN what it and calibrate write."""
    tensors = cast(tensors_of("cpu", shape), dtype)
    results = {f"d{name}": torch.full_like(t, torch.nan) for name, t in tensors.items()}
    cells = shape[0] * shape[1] * (shape[2] // 4**recursive) * (shape[3] // 4**recursive)
    maps = torch.full((cells * (1 + sum(16**level for level in range(recursive))),), torch.nan)
    y = {"y": results["dk"].clone()}
    return y | results | {"dy": torch.ones_like(tensors["k"]), "maps": maps} | tensors | {"recursive": recursive}


def run_raw(operators, **arguments):
    y = arguments.pop("y")
    forward = list(arguments.values())[8:]
    operators.calibrate(y, *forward)
    operators.calibrate_backward(*arguments.values())
    return {"y": y} | {name: value for name, value in arguments.items() if name[0] == "d" or name == "maps"}


@pytest.mark.parametrize("shape, recursive", [((2, 3, 41, 70), 1), ((2, 3, 38, 72), 2), ((1, 1, 64, 66), 3)], ids=str)
def test_does_not_depend_on_the_order_of_threads(operators, monkeypatch, shape, recursive):
    results = []
    for order in [*cuda_host.ORDERS, "shuffled"]:
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        results.append(run_raw(operators, **raw_arguments(shape, recursive)))
    for name, first in results[0].items():
        assert first.isfinite().all(), name
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"k": torch.ones(3, 9, 14)}, "k has 3 dimensions, expected 4"),
        ({"k": torch.ones(2, 3, 9, 14, dtype=torch.int32)}, "k has another dtype, expected float32"),
        ({"k": torch.ones(2, 3, 9, 14, device="meta")}, "k is on another kind of device, expected a CPU tensor"),
        ({"recursive": 0}, "recursive is 0, expected 1 to 14"),
        ({"recursive": 15}, "recursive is 15, expected 1 to 14"),
        ({"recursive": 2}, "k is 9x14 pixels, expected sides of 16 to 1073741823 for recursive = 2"),
        ({"maps": torch.ones(109)}, r"maps has shape \(109\), expected \(72\)"),
        ({"maps": torch.ones(72, dtype=torch.float64)}, "maps has another dtype, expected float32"),
        ({"maps": torch.ones(144)[::2]}, "maps is not contiguous"),
        ({"weight_agg": torch.ones(3, 16)}, r"weight_agg has shape \(3, 16\), expected \(3, 1, 4, 4\)"),
        ({"weight_dw": torch.ones(3, 1, 3, 3).double()}, "weight_dw has another dtype, expected that of k"),
        ({"weight_pw": torch.ones(3, 6, 1, 1)[:, ::2]}, "weight_pw is not contiguous"),
        ({"bias_pw": torch.ones(1)}, r"bias_pw has shape \(1\), expected \(3\)"),
        ({"y": torch.ones(2, 3, 9, 15)}, r"y has shape \(2, 3, 9, 15\), expected \(2, 3, 9, 14\)"),
        ({"dy": torch.ones(2, 3, 9)}, r"dy has shape \(2, 3, 9\), expected \(2, 3, 9, 14\)"),
        ({"dk": torch.ones(2, 3, 9, 14).half()}, "dk has another dtype, expected that of k"),
        ({"dweight_pw": torch.ones(3, 3)}, r"dweight_pw has shape \(3, 3\), expected \(3, 3, 1, 1\)"),
        ({"dbias_agg": torch.ones(6)[::2]}, "dbias_agg is not contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_library_refuses(operators, bad, message):
    with pytest.raises(RuntimeError, match=f"calibrate: {message}"):
        run_raw(operators, **raw_arguments() | bad)


def run_sanitized(path: str) -> None:
    """In a process of its own."""
    operators = cuda_host.load(Path(path))
    for shape, recursive in [
        ((2, 3, 9, 14), 1),
        ((0, 3, 9, 14), 1),
        ((1, 1, 4, 4), 1),
        ((1, 50, 6, 16), 1),
        ((1, 2, 37, 72), 2),
        ((1, 2, 66, 64), 3),
    ]:
        for dtype in (torch.float32, torch.bfloat16):
            arguments = raw_arguments(shape, recursive, dtype)
            y = run_raw(operators, **arguments)["y"]
            tensors = {name: arguments[name] for name in ("k", *calibrate_shapes(1))}
            expected = reference.calibrate(**cast(tensors, torch.float32), recursive=recursive)
            torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    print("clean")


def test_under_address_sanitizer():
    path = cuda_host.available(cuda_host.library, sanitize=True)
    code = "import sys, test_calibrate; test_calibrate.run_sanitized(*sys.argv[1:])"
    environment = cuda_host.available(cuda_host.asan_environment)
    finished = cuda_host.run_python(code, path, environment=environment)
    assert (finished.stdout, finished.returncode) == ("clean\n", 0), finished.stderr

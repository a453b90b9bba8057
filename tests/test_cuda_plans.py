"""How the CUDA kernels share images out: strips for multiprocessors, vectors for layouts; by helpers/cuda_host."""

import ctypes

import pytest
import torch
from helpers import cuda_host
from helpers.backends import running_on
from helpers.cuda_host import available
from helpers.cuda_host.strips import STRIPS, SWEEPS, sweep
from helpers.ops import calibrate_shapes, cast, random_parameters, striped_shapes, value_and_gradients
from torch import Tensor

from seemore_fast import ops
from seemore_fast.backends import selection

# What a multiprocessor holds at once, rows that a strip needs on either side, columns shared by two strips.
KINDS = {"K = 11": (12, 5, 0), "K = 3": (16, 1, 0), "row, K = 11": (12, 5, 8)}
PICTURES = [(480, 640), (1080, 1920), (2160, 3840)]
H200, A100, RTX_3090 = 132, 108, 82


@pytest.fixture(scope="module")
def library():
    sources = [cuda_host.HERE / "plans.cu", cuda_host.ROOT / "csrc" / "cuda" / "ops" / "calibrate_spread.cu"]
    built = ctypes.CDLL(str(available(cuda_host.compile_library, "plans", sources, cuda_host.CACHE)))
    built.spread_parts.restype = ctypes.c_int64
    return built


def numbers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


def plan(library, size, warps, reach, overlap, multiprocessors=H200) -> dict[str, int]:
    found = numbers(*6 * [-1])
    library.plan(numbers(*size), warps, reach, overlap, multiprocessors, found)
    return dict(zip(("lanes", "across", "down", "rows", "lead", "strips"), found, strict=True))


@pytest.mark.parametrize("size", [(1, 1, 0, 5), (1, 1, 5, 0), (0, 3, 5, 5), (2, 0, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_images_without_pixels_have_no_strips(library, kind, size):
    assert plan(library, size, *kind)["strips"] == 0


@pytest.mark.parametrize("multiprocessors", [H200, A100, RTX_3090, 1])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_strips_cover_the_image_once(library, kind, multiprocessors):
    _, reach, overlap = kind
    for size in [(1, 36, 480, 640), (32, 36, 64, 64), (1, 3, 7, 5), (2, 1, 1, 999), (1, 1, 999, 1), (1, 4, 1080, 1920)]:
        found = plan(library, size, *kind, multiprocessors)
        batch, channels, height, width = size
        assert found["strips"] == batch * channels * found["across"] * found["down"]
        assert (found["down"] - 1) * found["rows"] < height <= found["down"] * found["rows"]
        assert found["lead"] == (reach if found["down"] > 1 else 0)
        step = 4 * found["lanes"] - 2 * overlap
        assert (found["across"] - 1) * step < width <= (found["across"] - 1) * step + 4 * found["lanes"]


@pytest.mark.parametrize("multiprocessors", [H200, A100, RTX_3090])
@pytest.mark.parametrize("kind", ["K = 11", "K = 3"])
def test_large_images_keep_all_multiprocessors_busy(library, kind, multiprocessors):
    """The busiest one goes through hardly more rows than if all shared all rows evenly, without those beside strips."""
    for height, width in PICTURES:
        warps, reach, overlap = KINDS[kind]
        found = plan(library, (1, 36, height, width), warps, reach, overlap, multiprocessors)
        blocks = -(-found["strips"] * found["lanes"] // 64)
        busiest = -(-blocks // multiprocessors) * (found["rows"] + found["lead"] + reach)
        evenly = 36 * width * height / (4 * 64) / multiprocessors
        assert busiest <= evenly * (1.25 if height == 480 else 1.15)


def test_spread_has_no_empty_patches_and_a_single_round(library):
    """32 x 32 and 64 x 64 patches have one and two items for a thread; 480 x 640 pixels in one round of 528 blocks."""
    assert library.spread_parts(numbers(64, 36, 32, 32), ctypes.c_int64(2)) == 64
    assert library.spread_parts(numbers(64, 36, 64, 64), ctypes.c_int64(2)) == 64
    assert 400 < 36 * library.spread_parts(numbers(1, 36, 480, 640), ctypes.c_int64(2)) <= 528


@pytest.mark.parametrize(
    "strides, width, address, bytes, most, expected",
    [
        ((160, 80, 8, 1), 8, 64, 2, 8, 8),
        ((160, 80, 8, 1), 8, 64, 2, 4, 4),
        ((160, 80, 8, 1), 8, 72, 2, 8, 4),  # the address
        ((160, 80, 8, 1), 6, 64, 2, 8, 2),  # the width
        ((160, 80, 10, 1), 8, 64, 2, 8, 2),  # rows
        ((160, 81, 8, 1), 8, 64, 2, 8, 1),  # channels
        ((160, 1, 24, 3), 8, 64, 2, 8, 0),  # channels_last
        ((160, 1, 3, 3), 1, 64, 2, 8, 1),  # rows of a pixel
        ((160, 80, 8, 1), 8, 72, 4, 4, 2),
    ],
)
def test_vectors_are_as_long_as_the_layout_allows(library, strides, width, address, bytes, most, expected):
    assert library.vector(numbers(*strides), ctypes.c_int64(width), ctypes.c_int64(address), bytes, most) == expected


def in_rows_of(tensor: Tensor, stride: int) -> Tensor:
    """Return an image as it is in one whose rows are longer."""
    room = tensor.new_full((*tensor.shape[:-1], stride), torch.nan)
    room[..., : tensor.shape[-1]] = tensor
    return room[..., : tensor.shape[-1]]


def tensors_of(name: str, taps: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str], dict]:
    """Return an operator's tensors, the names of those that are images, and its options."""
    shapes, options = striped_shapes(2, taps), {"activation": "gelu"}
    images = ["x", "gate"] if name == "striped_conv" else ["x"]
    if name == "calibrate":
        images, shapes, options = ["k"], calibrate_shapes(2), {"recursive": 2}
    tensors = random_parameters({image: (1, 2, 37, 72) for image in images} | shapes, "cpu")
    return cast(tensors, dtype), images, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, taps", [*SWEEPS, ("calibrate", 0)])
def test_results_do_not_depend_on_the_length_of_vectors(name, taps, dtype):
    """Rows of the same image at multiples of 4, 2 and 1 elements, bit for bit."""
    tensors, images, options = tensors_of(name, taps, dtype)
    results = []
    with running_on("cuda_host", "cpu"):
        for stride in (72, 74, 73):
            laid = {n: in_rows_of(t, stride) if n in images else t for n, t in tensors.items()}
            results.append(value_and_gradients(getattr(ops, name), laid, **options))
    for what, first in results[0].items():
        assert first.isfinite().all(), what
        assert all(torch.equal(first, other[what]) for other in results[1:]), what


@pytest.mark.parametrize("name, taps", SWEEPS)
def test_results_do_not_depend_on_the_gpu(monkeypatch, name, taps):
    results = []
    for multiprocessors in (H200, RTX_3090, 3):
        monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", str(multiprocessors))
        with running_on("cuda_host", "cpu"):
            results.append(sweep(name, STRIPS["some, of quads"], taps, torch.bfloat16))
    for what, first in results[0].items():
        assert all(torch.equal(first, other[what]) for other in results[1:]), what


@pytest.mark.parametrize("which", [slice(None), slice(-1, None)], ids=["all", "last"])
@pytest.mark.parametrize("name, taps", [*SWEEPS, ("calibrate", 0)])
def test_kernels_are_given_rows(monkeypatch, name, taps, which):
    """Of channels_last images copies, and results are as for the same images in rows, where they belong."""
    tensors, images, options = tensors_of(name, taps, torch.float32)
    laid = {n: t.to(memory_format=torch.channels_last) if n in images[which] else t for n, t in tensors.items()}
    given = []
    functions = selection._functions

    class Watched:
        def __init__(self, backend, operator):
            self.library = functions(backend, operator)

        def __getattr__(self, part):
            operator = getattr(self.library, part)

            def watched(*arguments):
                given.extend(
                    a.stride(-1) for a in arguments if isinstance(a, Tensor) and a.dim() == 4 and a.shape[3] > 1
                )
                return operator(*arguments)

            watched.default = operator.default
            return watched

    with running_on("cuda_host", "cpu"):
        expected = value_and_gradients(getattr(ops, name), tensors, **options)
        monkeypatch.setattr(selection, "_functions", Watched)
        found = value_and_gradients(getattr(ops, name), laid, **options)
    assert given
    assert set(given) == {1}
    for what, value in expected.items():
        assert torch.equal(found[what], value), what

"""The CUDA library's network operator, on the host, or on a GPU with --device cuda."""

import contextlib
import ctypes
import re

import helpers.backends
import numpy as np
import pytest
import torch
from helpers import cuda_host
from helpers.backends import kernels_of, running_on, uninitialised_is_nan
from helpers.cuda_host import ORDERS, available, run_python
from helpers.networks import CASES, network, route_apart
from helpers.ops import LAYOUTS
from PIL import Image

from seemore_fast import SeemoRe, load_model, reference
from seemore_fast.benchmarks import gpu_model
from seemore_fast.demo.__main__ import PHOTO
from seemore_fast.evaluation import psnr_y
from seemore_fast.io.resize import bicubic_resize
from seemore_fast.network import engine
from seemore_fast.network.config import PRESETS

each_gpu = pytest.mark.parametrize("backend", [b for b in kernels_of("network") if b.family == "cuda"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
each_integer = pytest.mark.parametrize("integer", [torch.uint8, torch.uint16], ids=str)

OTHERS = {  # CASES have at most 40 features
    "one pixel": (dict(), (8, 3, 1, 1)),  # of one image, errors are too few to be compared
    "B": (dict(embedding_dim=48, scale=4), (1, 3, 41, 66)),
    "L": (dict(embedding_dim=48, use_shuffle=False, recursive=1), (2, 3, 24, 70)),
    "50 features": (dict(embedding_dim=50, num_layers=1), (1, 3, 18, 33)),
    "64 features": (dict(embedding_dim=64, num_experts=6, lr_space="linear", topk=2), (1, 3, 33, 65)),
    "several bands": (dict(num_layers=1), (1, 3, 301, 21)),
    "more outputs than are computed at once": (dict(scale=4, in_chans=5, num_layers=1), (1, 5, 17, 18)),
}
SHAPES = {**CASES, **OTHERS}
QUICK = ["T, narrow", "one pixel", "batch of 5", "5 features", "kernel 7", "recursive 1", "2 of 4 experts", "L"]
SERVED = [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in SHAPES if case != "kernel 31"]


def plain(model: SeemoRe, dtype: torch.dtype) -> reference.SeemoRe:
    other = reference.SeemoRe(**model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other.to(model.mean.device, dtype)


def serve(model: SeemoRe, x: torch.Tensor) -> torch.Tensor:
    """Return model(x), by the engine for certain."""
    assert engine.unsupported_reason(model, x) is None
    return model(x)


@pytest.fixture
def small(device):
    return network().to(device, torch.bfloat16)


@each_gpu
@each_dtype
@pytest.mark.parametrize("case", SERVED)
def test_values(backend, device, dtype, case):
    """The error is at most twice that of the plain network in the same type."""
    config, shape = SHAPES[case]
    model, x = network(**config).to(device), torch.rand(shape, device=device)
    exact = plain(model, torch.float64)(x.double())
    eager = plain(model, torch.float32).to(dtype)(x)
    with running_on(backend, device):
        found = serve(model.to(dtype), x)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    for norm in (torch.Tensor.std, lambda error: error.abs().max()):
        allowed = 2 * norm(eager.double() - exact) + 1e-5 * exact.abs().max()
        assert norm(found.double() - exact) <= allowed


@each_gpu
def test_autocast_gives_what_narrow_weights_give_but_for_their_rounding(backend, device):
    model, x = network().to(device), torch.rand(1, 3, 20, 33, device=device)
    exact = plain(model, torch.float64)(x.double())
    with torch.autocast(torch.device(device).type, torch.bfloat16), running_on(backend, device):
        found = serve(model, x)
    eager = plain(model, torch.bfloat16)(x)
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()


@each_gpu
@pytest.mark.parametrize("order", [*ORDERS[1:]])
def test_results_do_not_depend_on_the_order_of_threads(backend, device, small, monkeypatch, order):
    if backend != "cuda_host":
        pytest.skip("a GPU has an order of its own")
    x = torch.rand(2, 3, 21, 37)
    with running_on(backend, device):
        first = serve(small, x)
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        assert torch.equal(serve(small, x), first)


@each_gpu
@pytest.mark.parametrize("kilobytes", [100, 164], ids=["sm_86", "sm_80"])
def test_results_do_not_depend_on_the_columns_of_strips(backend, device, monkeypatch, kilobytes):
    """Little shared memory makes strips narrow. The pool's sums are then in another order, and nothing else."""
    if backend != "cuda_host":
        pytest.skip("a GPU's shared memory is what it is")
    model, x = network(embedding_dim=64, num_layers=1).bfloat16(), torch.rand(1, 3, 19, 75)
    with running_on(backend, device):
        wide = serve(model, x)
        monkeypatch.setenv("CUDA_HOST_SHARED", str(kilobytes))
        torch.testing.assert_close(serve(model, x), wide, rtol=0, atol=2e-3)


@each_gpu
def test_memory_that_nobody_filled_is_not_used(backend, device, small):
    x = torch.rand(1, 3, 18, 45, device=device)
    with running_on(backend, device):
        expected = serve(small, x)
        with uninitialised_is_nan():
            assert torch.equal(serve(small, x), expected)


@each_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, small, layout):
    x = torch.rand(2, 3, 18, 21, device=device)
    with running_on(backend, device):
        assert torch.equal(serve(small, LAYOUTS[layout](x)), serve(small, x))


@each_gpu
def test_images_of_a_batch_are_routed_each_by_itself(backend, device):
    model, x = network(num_layers=1).to(device), torch.rand(3, 3, 17, 19, device=device)
    x *= torch.tensor([0.3, 0.6, 1.0], device=device)[:, None, None, None]
    assert len(route_apart(model, x).unique()) > 1
    model.bfloat16()
    with running_on(backend, device):
        together = serve(model, x)
        for i in range(3):
            assert torch.equal(serve(model, x[i : i + 1]), together[i : i + 1])


@each_gpu
def test_prepared_weights_give_the_same_and_others_are_never_stale(backend, device, small):
    x = torch.rand(1, 3, 18, 20, device=device)
    with running_on(backend, device):
        before = serve(small, x)
        small.conv_1.weight.data.mul_(0.5)
        changed = serve(small, x)
        assert not torch.equal(changed, before)
        small.prepare()
        assert torch.equal(serve(small, x), changed)
        small.conv_1.weight.data.mul_(2)
        assert torch.equal(serve(small, x), changed)


@each_gpu
@each_integer
def test_integers_are_the_rounded_floats(backend, device, small, integer):
    largest = torch.iinfo(integer).max
    x = torch.from_numpy(np.random.default_rng(0).integers(0, largest + 1, (1, 3, 17, 22))).to(device)
    y = torch.empty(1, 3, 34, 44, dtype=integer, device=device)
    with running_on(backend, device):
        assert engine.run_out(small, x.to(integer), y)
        floats = serve(small, x.float() / largest)
    assert torch.equal(y.int(), (floats.clamp(0, 1) * largest).round().int())


@each_gpu
@each_integer
def test_weights_that_are_no_numbers_are_reported(backend, device, small, integer):
    small.conv_2.bias.data[0] = torch.nan
    x = torch.zeros(1, 3, 17, 22, dtype=integer, device=device)
    with running_on(backend, device):
        assert not engine.run_out(small, x, torch.empty(1, 3, 34, 44, dtype=integer, device=device))
        assert serve(small, torch.zeros(1, 3, 17, 22, device=device)).isnan().any()


@each_gpu
def test_an_expert_that_nobody_chose_may_hold_anything(backend, device, small):
    x = torch.rand(1, 3, 18, 20, device=device)
    moe = small.body[1].local_block.block.moe_layer
    with running_on(backend, device):
        expected = serve(small, x)
        for expert in moe.experts:
            kept = {name: value.clone() for name, value in expert.state_dict().items()}
            for parameter in expert.parameters():
                parameter.fill_(torch.inf)
            same = torch.equal(serve(small, x), expected)
            expert.load_state_dict(kept)
            if same:
                return
    pytest.fail("every expert changes the result")


@each_gpu
@pytest.mark.slow
@each_dtype
def test_costs_less_than_a_hundredth_of_a_decibel(backend, device, dtype):
    with Image.open(PHOTO) as photo:
        target = np.asarray(photo.convert("RGB"))[:256, 64:320]
    low = bicubic_resize(target, 1 / 2)
    x = torch.from_numpy(low).permute(2, 0, 1)[None].to(device)

    def quality(model: SeemoRe) -> float:
        y = torch.empty(1, 3, 256, 256, dtype=torch.uint8, device=device)
        assert engine.run_out(model, x, y)
        return psnr_y(y[0].permute(1, 2, 0).cpu().numpy(), target, crop=2)

    model = load_model("seemore_t_x2").eval().requires_grad_(False)
    expected = quality(model)
    with running_on(backend, device):
        assert abs(quality(model.to(device, dtype)) - expected) < 0.01


@each_gpu
@each_dtype
def test_large_features_that_are_all_equal_give_numbers(backend, device, dtype):
    """What LayerNorm makes of padded channels overflows in float16, and has weights of 0."""
    model, x = network(num_layers=1).to(device), torch.rand(1, 3, 16, 16, device=device)
    model.conv_1.weight.zero_()
    model.conv_1.bias.fill_(2000)
    with running_on(backend, device):
        assert serve(model.to(dtype), x).isfinite().all()


# When it does not serve


@pytest.mark.parametrize("name", [str(backend) for backend in kernels_of("network") if backend.family == "cuda"])
@pytest.mark.parametrize(
    "config, dtype, reason",
    [
        (dict(global_kernel_size=13), torch.bfloat16, "taps are 13, at most 11"),
        (
            dict(num_experts=17, lr_space="linear"),
            torch.bfloat16,
            "experts are 17, at most 16, ranks are 170, at most 64",
        ),
        (dict(recursive=4), torch.bfloat16, "recursive are 4, at most 3"),
        (
            dict(embedding_dim=65),
            torch.bfloat16,
            "the library for x's device is not there or not chosen, or has no kernels",
        ),
        (dict(), torch.float32, "features are float32: on a GPU the operators compute those"),
    ],
    ids=["taps", "experts", "recursive", "channels", "float32"],
)
def test_what_it_has_no_kernels_for_is_left_to_the_operators(name, device, config, dtype, reason):
    model = network(num_layers=1, **config).to(device, dtype)
    with running_on(name, device):
        assert engine.unsupported_reason(model, torch.rand(1, 3, 16, 16, device=device)).startswith(reason)


@pytest.mark.parametrize("name", [str(backend) for backend in kernels_of("network") if backend.family == "cuda"])
def test_the_library_refuses_float32(name, device):
    model, x = network(num_layers=1).to(device), torch.rand(1, 3, 16, 16, device=device)
    with running_on(name, device), pytest.raises(RuntimeError, match="dtype is neither float16 nor bfloat16"):
        engine.run_out(model, x, torch.empty(1, 3, 32, 32, device=device))


# What the host does


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(str(available(cuda_host.library)))
    found.recorded.restype = ctypes.c_char_p
    return found


@contextlib.contextmanager
def launches(library):
    """Record launches, of which none is run: (kernel, blocks, threads, shared bytes)."""
    recorded = []
    library.record(1)
    try:
        yield recorded
        for line in library.recorded().decode().splitlines():
            name, *numbers = line.rsplit(maxsplit=3)
            recorded.append((name, *map(int, numbers)))
    finally:
        library.record(0)


@pytest.mark.parametrize("preset", ["t", "b", "l"])
def test_a_call_makes_six_launches_a_group_and_two(library, preset):
    model = SeemoRe(scale=4, **PRESETS[preset]).bfloat16().eval().requires_grad_(False)
    with running_on("cuda_host", "cpu"), launches(library) as made:
        model(torch.rand(1, 3, 48, 64))
    packing = [launch for launch in made if "pack" in launch[0]]
    groups = model.config["num_layers"]
    assert len(packing) == groups + 1
    assert len(made) - len(packing) == 6 * groups + 2
    model.prepare()
    with running_on("cuda_host", "cpu"), launches(library):
        model(torch.rand(1, 3, 48, 64))
    with running_on("cuda_host", "cpu"), launches(library) as made:
        model(torch.rand(1, 3, 48, 64))
    assert len(made) == 6 * groups + 2


@pytest.mark.parametrize("height, width", [(480, 640), (720, 1280), (17, 33)])
@pytest.mark.parametrize("preset", ["t", "b"])
def test_the_model_of_the_time_has_these_launches(library, preset, height, width):
    model = SeemoRe(scale=4, **PRESETS[preset]).bfloat16().eval().requires_grad_(False)
    with running_on("cuda_host", "cpu"), launches(library) as made:
        model(torch.rand(1, 3, height, width))
    by_name = {}
    for name, blocks, threads, _ in made:
        by_name.setdefault(re.search(r"\w+_kernel", name)[0], []).append((blocks, threads // 32))
    expected = {}
    for launch in gpu_model.launches({**PRESETS[preset], "scale": 4}, height, width):
        expected.setdefault(f"{launch.name}_kernel", []).append((launch.blocks, launch.warps))
    for name, sizes in expected.items():
        assert set(by_name[name]) == set(sizes), name


@pytest.mark.parametrize("kilobytes, least", [(100, 6), (164, 8), (228, 12)], ids=["sm_86", "sm_80", "sm_90"])
@pytest.mark.parametrize("preset", ["t", "b"])
def test_shared_memory_leaves_a_multiprocessor_enough_warps(library, monkeypatch, preset, kilobytes, least):
    monkeypatch.setenv("CUDA_HOST_SHARED", str(kilobytes))
    model = SeemoRe(scale=4, **PRESETS[preset]).bfloat16().eval().requires_grad_(False)
    with running_on("cuda_host", "cpu"), launches(library) as made:
        model(torch.rand(1, 3, 480, 640))
    warps = {}
    for name, _, threads, shared in made:
        assert shared <= (kilobytes - 1) * 1024, name
        if shared:
            warps[name] = kilobytes * 1024 // (shared + 1024) * threads // 32
    assert min(warps.values()) >= least, warps


def run_sanitized(path: str):
    """In a process of its own, with that library."""
    helpers.backends._load_host_library = lambda: torch.ops.load_library(path)
    for config, shape in [(dict(num_layers=1), (1, 3, 18, 47)), (dict(num_layers=1, embedding_dim=50), (2, 3, 16, 17))]:
        with torch.no_grad(), running_on("cuda_host", "cpu"):
            assert serve(network(**config).bfloat16(), torch.rand(shape)).isfinite().all()
    print("clean")


def test_under_address_sanitizer():
    path = available(cuda_host.library, sanitize=True)
    code = "import sys, test_cuda_network; test_cuda_network.run_sanitized(*sys.argv[1:])"
    finished = run_python(code, path, environment=available(cuda_host.asan_environment))
    assert (finished.stdout, finished.returncode) == ("clean\n", 0), finished.stderr


@pytest.fixture(scope="module")
def instructions():
    """The library of helpers.cuda_host.products; tensors go by their address."""
    source = cuda_host.HERE / "products.cu"
    built = ctypes.CDLL(str(available(cuda_host.compile_library, "products", [source], cuda_host.CACHE)))

    def call(name: str, *arguments):
        as_c = [ctypes.c_void_p(each.data_ptr()) if torch.is_tensor(each) else each for each in arguments]
        getattr(built, name)(*as_c)

    return call


def test_an_instruction_of_a_warp_multiplies_as_documented(instructions):
    """mma.sync m16n8k16 of known numbers, by the layout of fragments in the PTX manual."""
    left, right = torch.randint(-8, 9, (16, 16)).double(), torch.randint(-8, 9, (16, 8)).double()
    lanes = range(32)
    a = [[left[lane // 4 + 8 * (i % 4 // 2), lane % 4 * 2 + i % 2 + 8 * (i // 4)] for i in range(8)] for lane in lanes]
    b = [[right[lane % 4 * 2 + i % 2 + 8 * (i // 2), lane // 4] for i in range(4)] for lane in lanes]
    for inputs, wanted in ((16, left @ right), (8, left[:, :8] @ right[:8])):
        operands = [torch.tensor(rows).bfloat16()[:, : n * inputs // 16].contiguous() for rows, n in ((a, 8), (b, 4))]
        found = torch.empty(32, 4)
        instructions("product", inputs, *operands, found)
        for lane in lanes:
            for i in range(4):
                assert found[lane, i] == wanted[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


def test_an_instruction_of_a_warp_reads_matrices_as_documented(instructions):
    """ldmatrix.x4: lane l gets elements 2 (l % 4) and the next one of row l / 4, of each matrix."""
    rows = torch.arange(4 * 8 * 8, dtype=torch.int16)  # [matrix][row][element]
    found = torch.empty(32, 4, 2, dtype=torch.int16)
    instructions("matrices", rows, found)
    for lane in range(32):
        expected = rows.view(4, 8, 4, 2)[:, lane // 4, lane % 4]
        assert torch.equal(found[lane], expected)


def test_pairs_are_rounded_once(instructions):
    a, b, c = (torch.randn(32, 2).half() for _ in range(3))
    found = torch.empty(32, 3, 2, dtype=torch.float16)
    instructions("pairs", a, b, c, found)
    exact = a.double() * b.double()
    for i, expected in enumerate((exact + c.double(), exact, a.double().tanh())):
        assert torch.equal(found[:, i], expected.half())

"""The CPU library's network operator: against the reference in float64, whatever the configuration, size and layout."""

import functools
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.backends import at_large_offsets, kernels_of, running_on, uninitialised_is_nan
from helpers.networks import CASES, network, route_apart
from helpers.ops import LAYOUTS, largest_difference
from PIL import Image

from seemore_fast import SeemoRe, backends, load_model, reference, use_backend
from seemore_fast.demo.__main__ import PHOTO
from seemore_fast.evaluation import psnr_y
from seemore_fast.io.resize import bicubic_resize
from seemore_fast.network import engine

each_cpu = pytest.mark.parametrize("backend", [b for b in kernels_of("network") if b.family == "cpu"])
each_precision = pytest.mark.parametrize("in_bfloat16", [False, True], ids=["float32", "bfloat16"])
each_integer = pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)

MOE = "body.1.local_block.block.moe_layer"
each_case = pytest.mark.parametrize("case", CASES)


def random_case(seed: int) -> tuple[dict, tuple[int, ...]]:
    draw = random.Random(seed)
    experts = draw.randint(1, 5)
    config = dict(
        scale=draw.randint(1, 4),
        in_chans=draw.choice([1, 2, 3, 4]),
        num_experts=experts,
        num_layers=draw.randint(1, 3),
        embedding_dim=draw.choice([4, 5, 12, 13, 20, 36]),
        img_range=draw.choice([1.0, 255.0]),
        use_shuffle=draw.random() < 0.5,
        global_kernel_size=draw.choice([1, 3, 5, 7, 11, 31]),
        recursive=draw.randint(1, 3),
        lr_space=draw.choice(["linear", "exp", "double"]),
        topk=draw.randint(1, experts),
    )
    least = 4 ** config["recursive"]
    sides = [draw.choice([1, least, least + 1, draw.randint(1, 150), draw.randint(1, 150)]) for _ in range(2)]
    return config, (draw.randint(1, 5) if sides[0] * sides[1] < 4000 else 1, config["in_chans"], *sides)


def plain(model: SeemoRe, dtype: torch.dtype = torch.float32) -> reference.SeemoRe:
    other = reference.SeemoRe(**model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other.to(dtype)


def run_in_bfloat16(monkeypatch):
    """Make the engine believe that the processor multiplies bfloat16, and so compute in it what is bfloat16."""
    monkeypatch.setattr(engine, "native", SimpleNamespace(instruction_set=lambda: "avx512_bf16"))


@pytest.fixture
def precision(request, monkeypatch):
    """Context in which the engine computes in float32, or its features in bfloat16."""
    run_in_bfloat16(monkeypatch)
    return lambda in_bfloat16: torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16)


def serve(model: SeemoRe, x: torch.Tensor) -> torch.Tensor:
    """Return model(x), by the engine for certain."""
    assert engine.unsupported_reason(model, x) is None
    return model(x)


def with_threads(count: int, function, *arguments):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)


def assert_within_yardstick(backend: str, config: dict, shape: tuple[int, ...]):
    """The error is at most twice that of eager float32, and 4e-6 of the largest value (of 1 if that is less)."""
    model, x = network(**config), torch.rand(shape)
    exact = plain(model, torch.float64)
    exact.mean = model.mean.double()
    truth = exact(x.double())
    allowed = 2 * largest_difference(plain(model)(x), truth) + 4e-6 * max(1, truth.abs().max().item())
    with running_on(backend, "cpu"):
        assert largest_difference(serve(model, x), truth) <= allowed


@each_cpu
@each_case
def test_values(backend, case):
    assert_within_yardstick(backend, *CASES[case])


@each_cpu
@pytest.mark.parametrize("seed", range(6))
def test_values_of_random_configurations(backend, seed):
    assert_within_yardstick(backend, *random_case(seed))


@pytest.mark.slow
@each_cpu
def test_values_of_many_random_configurations(backend):
    for seed in range(6, 100):
        config, shape = random_case(seed)
        with_threads(1 + seed % 5, assert_within_yardstick, backend, config, shape)


@each_cpu
@each_precision
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "flipped", "far"])
def test_layouts(backend, precision, in_bfloat16, layout):
    change = {
        "expanded": lambda x: x[:1, :, :1].expand(2, -1, 24, -1),
        "flipped": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "far": at_large_offsets,
    }
    model, x = network(), {**LAYOUTS, **change}[layout](torch.rand(2, 3, 24, 40))
    with running_on(backend, "cpu"), precision(in_bfloat16):
        assert torch.equal(serve(model, x), serve(model, x.clone(memory_format=torch.contiguous_format)))


@each_cpu
@each_precision
@pytest.mark.parametrize(
    "shape", [(1, 3, 17, 130), (1, 3, 75, 30), (1, 3, 61, 300), (3, 3, 24, 16), (7, 3, 16, 16), (3, 3, 20, 161)]
)
def test_every_number_of_threads_gives_the_same_bits(backend, precision, in_bfloat16, shape):
    model, x = network(global_kernel_size=7), torch.rand(shape)
    with running_on(backend, "cpu"), precision(in_bfloat16):
        first, *others = [with_threads(count, serve, model, x) for count in (1, 2, 3, 5, 8, 16, 33, 2)]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("limit", [1, 3])
def test_fewer_threads_than_planned_take_the_strips_one_after_another(limit):
    """OpenMP may give fewer threads than torch asks for: no strip waits for one that no thread has taken."""
    script = """
import torch
from seemore_fast import seemore_t
model, x = seemore_t(scale=2).eval(), torch.rand(1, 3, 40, 300)
torch.set_num_threads(16)
with torch.no_grad():
    many = model(x)
    torch.set_num_threads(1)
    assert torch.equal(many, model(x))
"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(limit)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


@each_cpu
@each_precision
def test_images_of_a_batch_are_routed_each_by_itself(backend, precision, in_bfloat16):
    model = network()
    x = torch.rand(5, 3, 24, 40) * torch.tensor([0.1, 1, 0.5, 2, 0.7])[:, None, None, None]
    assert len(route_apart(model, x).unique()) > 1
    with running_on(backend, "cpu"), precision(in_bfloat16):
        single = torch.cat([serve(model, image[None]) for image in x])
        for threads in (1, 3):
            assert torch.equal(with_threads(threads, serve, model, x), single)


# Memory


def result_inside_a_larger_tensor(shape, dtype, filler):
    """Return a tensor full of `filler`, and a strided view of its middle."""
    larger = torch.full([2 * size + 3 for size in shape], filler).to(dtype)
    return larger, larger[tuple(slice(2, 2 * size + 2, 2) for size in shape)]


@each_cpu
@each_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 17, 23), (1, 3, 30, 130), (1, 3, 5, 20)])
def test_only_the_result_is_written_and_all_of_it(backend, precision, in_bfloat16, dtype, shape):
    model = network()
    filler = torch.nan if dtype == torch.float32 else 77
    wanted = (*shape[:2], 2 * shape[2], 2 * shape[3])
    x = torch.rand(shape)
    x = x if dtype == torch.float32 else (200 * x).to(dtype)
    (first, view), (larger, inside) = (result_inside_a_larger_tensor(wanted, dtype, value) for value in (filler, 0))
    with running_on(backend, "cpu"), precision(in_bfloat16), uninitialised_is_nan():
        for y in (view, inside):
            assert engine.run_out(model, x, y)
    assert np.array_equal(view.numpy(), inside.numpy())
    view.zero_(), inside.zero_()
    assert not larger.numpy().any()
    expected, of_expected = result_inside_a_larger_tensor(wanted, dtype, filler)
    of_expected.zero_()
    np.testing.assert_array_equal(first.numpy(), expected.numpy())


FINGERPRINTS = """
import torch
from seemore_fast.backends import native
from helpers.networks import network

from seemore_fast import backends
from seemore_fast.network import engine

assert backends.unsupported_reason("cpu") is None
torch.manual_seed(0)
for config, shape in ({}, (1, 3, 20, 130)), (dict(embedding_dim=5, global_kernel_size=31), (2, 3, 40, 20)):
    model, x = network(**config), torch.rand(shape)
    for name in native.instruction_sets():
        native.use_instruction_set(name)
        for dtype in (torch.float32, torch.bfloat16):
            options = engine.config_of(model)._replace(dtype=engine.NUMBERS[dtype]).numbers()
            y = torch.ops.seemore_fast.network(x, model.ordered_parameters(), False, model.mean, 1.0, options).double()
            print(y.sum().item(), y.square().sum().item())
"""


@pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")
def test_memory_that_nobody_filled_is_not_used():
    """Where the library allocates by itself; glibc fills that with a byte, here floats of 3e38."""
    command, here = [sys.executable, "-c", FINGERPRINTS], Path(__file__).parent
    run = functools.partial(subprocess.run, command, cwd=here, stdout=subprocess.PIPE, text=True, check=True)
    first, filled = (run(env={**os.environ, "MALLOC_PERTURB_": byte}).stdout for byte in ("0", "128"))
    assert first == filled
    assert first and "nan" not in first


# Precisions and integers


@each_cpu
@pytest.mark.parametrize("case", ["T, narrow", "5 features", "13 features, no shuffle", "all experts", "range 255"])
def test_bfloat16_is_within_the_yardstick(backend, precision, case):
    """Its error is at most twice that of eager PyTorch under autocast."""
    config, shape = CASES[case]
    model, x = network(**config), torch.rand(shape)
    with use_backend("reference"):
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            eager = model(x)
    with running_on(backend, "cpu"), precision(True):
        y = serve(model, x)
    assert y.dtype == torch.float32
    assert 0 < largest_difference(y, full) <= 2 * largest_difference(eager, full)


@each_cpu
@pytest.mark.parametrize("how", ["to", "autocast"])
def test_bfloat16_costs_less_than_a_hundredth_of_a_decibel(backend, monkeypatch, how):
    truth = np.asarray(Image.open(PHOTO))
    small = torch.from_numpy(bicubic_resize(truth, 0.5).copy()).permute(2, 0, 1)[None]
    model = load_model("seemore_t_x2").eval()

    def quality(model):
        y = np.empty(truth.shape, np.uint8)
        assert engine.run_out(model, small, torch.from_numpy(y).permute(2, 0, 1)[None])
        return psnr_y(y, truth, crop=2)

    with torch.no_grad(), running_on(backend, "cpu"):
        full = quality(model)
        run_in_bfloat16(monkeypatch)
        if how == "to":
            narrow = quality(model.to(torch.bfloat16))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                narrow = quality(model)
    assert 0 < abs(narrow - full) < 0.01


@each_cpu
@each_integer
@pytest.mark.parametrize("shape", [(1, 3, 40, 60), (2, 3, 3, 30), (1, 1, 18, 19)])
def test_integers_are_the_rounded_floats(backend, dtype, shape):
    whole = torch.iinfo(dtype).max
    model = network(in_chans=shape[1])
    model.upsampler[0].weight *= 5
    model.upsampler[0].bias += 0.3
    x = (torch.rand(shape) * 1.4 - 0.2).clamp(0, 1).mul(whole).round().to(dtype)
    y = torch.empty(shape[0], 2 * shape[2], 2 * shape[3], shape[1], dtype=dtype).permute(0, 3, 1, 2)
    with running_on(backend, "cpu"):
        expected = serve(model, x.float() / whole).clamp(0, 1).mul(whole).round().to(dtype)
        for laid_out in (x, x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            assert engine.run_out(model, laid_out, y)
            np.testing.assert_array_equal(y.numpy(), expected.numpy())
    assert y.numpy().min() == 0 and y.numpy().max() == whole, "the case must have results beyond the range"


# Values that are no numbers


@each_cpu
@each_precision
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e30])
def test_pixels_that_are_no_numbers_spoil_their_own_image_as_in_the_reference(backend, precision, in_bfloat16, value):
    model, x = network(), torch.rand(3, 3, 20, 30)
    with running_on(backend, "cpu"), precision(in_bfloat16):
        clean = serve(model, x)
        x[1, 2, 7, 9] = value
        y = serve(model, x)
        with use_backend("reference"):
            expected = model(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[::2], clean[::2])


@each_cpu
@each_precision
@each_integer
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["upsampler.0.bias", "conv_2.weight", f"{MOE}.gate.body.2.weight"])
def test_weights_that_are_no_numbers_show_and_are_told(backend, precision, in_bfloat16, dtype, value, name):
    model, x = network(), torch.rand(1, 3, 20, 30)
    model.get_parameter(name).view(-1)[5] = value
    with running_on(backend, "cpu"), precision(in_bfloat16):
        y = serve(model, x)
        with use_backend("reference"):
            expected = model(x)
        integers = x.mul(torch.iinfo(dtype).max).to(dtype)
        are_numbers = engine.run_out(model, integers, torch.empty(y.shape, dtype=dtype))
    assert torch.equal(y.isfinite(), expected.isfinite())  # convolutions of fewer products make NaN of infinite weights
    assert are_numbers == expected.isfinite().all()


@each_cpu
@each_precision
def test_an_expert_that_nobody_chose_may_hold_anything(backend, precision, in_bfloat16):
    model, x = network(num_layers=1), torch.rand(1, 3, 20, 30)
    moe, choices = model.body[0].local_block.block.moe_layer, []
    handle = moe.gate.register_forward_hook(lambda module, inputs, output: choices.extend(output[0].flatten().tolist()))
    model(x)
    handle.remove()
    with running_on(backend, "cpu"), precision(in_bfloat16):
        expected = serve(model, x)
        for i, expert in enumerate(moe.experts):
            for parameter in expert.parameters():
                parameter.mul_(1 if i in choices else torch.nan)
        assert torch.equal(serve(model, x), expected)
